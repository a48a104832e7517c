"""Whatever a model (or a file that is imported) says: nothing of it runs, and nothing of it asks another host."""

from __future__ import annotations

import httpx
import pytest

from tests.browser.looking import Look
from tests.gateway.running import Running

# After OWASP's filter evasion list and what chat pages have fallen for.
XSS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<svg><animate onbegin=alert(1) attributeName=x dur=1s>",
    "<iframe src=javascript:alert(1)></iframe>",
    "<iframe srcdoc='<script>parent.alert(1)</script>'></iframe>",
    "<math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)>",
    "<details open ontoggle=alert(1)>x</details>",
    "<body onload=alert(1)>",
    "<input autofocus onfocus=alert(1)>",
    "<video><source onerror=alert(1)></video>",
    "<a href='javascript:alert(1)' id=bait>click</a>",
    "<form action=javascript:alert(1)><button id=bait>go</button></form>",
    "<object data=javascript:alert(1)>",
    "<embed src=javascript:alert(1)>",
    "<meta http-equiv=refresh content='0;url=https://example.org'>",
    "<base href=https://example.org/>",
    "<link rel=stylesheet href=https://example.org/x.css>",
    "<style>@import 'https://example.org/x.css'; body{background:url(https://example.org/y)}</style>",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
    "<template><script>alert(1)</script></template>",
    "[click](javascript:alert(1))",
    "[click](JaVaScRiPt:alert(1))",
    "[click](java\tscript:alert(1))",
    "[click](&#106;avascript:alert(1))",
    "[click](data:text/html,<script>alert(1)</script>)",
    "[click](vbscript:msgbox(1))",
    '[click](https://example.org "x\\" onmouseover=alert(1) y=\\"")',
    "[x]: javascript:alert(1)\n\n[click][x]",
    "<javascript:alert(1)>",
    "![x](https://example.org/tracker.png)",
    "![x](x){onerror=alert(1)}",
    '![" onerror="alert(1)](x)',
    "```html\n<script>alert(1)</script>\n```",
    "```<img/src/onerror=alert(1)>\ncode\n```",
    '```"onmouseover="alert(1)\ncode\n```',
    "`<img src=x onerror=alert(1)>`",
    "| <img src=x onerror=alert(1)> | b |\n|---|---|\n| <script>alert(1)</script> | d |",
    "# <img src=x onerror=alert(1)>",
    "> <svg onload=alert(1)>",
    "- [ ] <img src=x onerror=alert(1)>",
    "<div style='position:fixed;inset:0;z-index:99;background:url(https://example.org/z)'>covered</div>",
    "<figure class=code><button data-copy>Copy</button><code>evil</code></figure>",
    "<x id=app></x><x id=main></x><x name=cookie></x>",
    "</textarea><script>alert(1)</script>",
    "]]><script>alert(1)</script>",
    "<!--><script>alert(1)</script>-->",
    "{{constructor.constructor('alert(1)')()}} {@html '<script>alert(1)</script>'}",
    "\u202e<script>alert(1)</script>\u0000",
]


@pytest.fixture(scope="module")
def conversation(tiny_gateway: Running) -> str:
    """A conversation whose every text is an attack; its path."""
    with tiny_gateway.client() as client:
        made = client.post("/api/ui/conversations", json={"title": "<img src=x onerror=alert(1)>", "system": XSS[0]}).json()
        exported = client.get(f"/api/ui/conversations/{made['id']}/export").json()
        return f"/c/{_imported(client, exported)}"


def _imported(client: httpx.Client, exported: dict[str, object]) -> str:
    messages = []
    for number, attack in enumerate(XSS):
        text = attack.replace("\u0000", "")  # no JSON of the gateway's holds one
        question, answer = f"q{number}", f"a{number}"
        parent = f"a{number - 1}" if number else None
        common = {"state": "done", "created": "2026-01-01T00:00:00Z", "stats": None, "error": None, "notices": []}
        messages.append({"id": question, "parent": parent, "role": "user", "text": text, "finish": None, **common})
        messages.append(
            {"id": answer, "parent": question, "role": "assistant", "text": text, "finish": "stop", **common, "notices": [text]}
        )
    whole = {**exported, "messages": messages, "leaf": f"a{len(XSS) - 1}"}
    response = client.post("/api/ui/conversations/import", json=whole)
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


def test_nothing_that_is_said_runs(tiny_gateway: Running, conversation: str, look: Look) -> None:
    page = look(tiny_gateway.url + conversation)
    page.locator("li[data-state]").nth(2 * len(XSS) - 1).wait_for()
    said = page.locator("main ol")
    for tag in ("script", "img", "iframe", "object", "embed", "style", "link", "base", "meta", "form", "video", "math", "template"):
        assert said.locator(tag).count() == 0, f"an answer put <{tag}> into the page"
    held = said.evaluate(
        "list => [...list.querySelectorAll('*')].flatMap(node => [...node.attributes]).map(({name, value}) => `${name}=${value}`)"
    )
    assert not [each for each in held if each.startswith(("on", "style=")) or "javascript:" in each.lower()], held
    links = said.locator("a")
    for index in range(links.count()):
        assert links.nth(index).get_attribute("href", timeout=1000).startswith(("https://example.org", "#"))  # type: ignore[union-attr]
        assert "noopener" in (links.nth(index).get_attribute("rel") or "")
    page.wait_for_timeout(500)  # for whatever would run late; the fixture looks for dialogs and requests
    assert page.url.startswith(tiny_gateway.url)


def test_scripts_from_elsewhere_and_inline_ones_are_refused(tiny_gateway: Running) -> None:
    with tiny_gateway.client() as client:
        policy = client.get("/").headers["Content-Security-Policy"]
    assert "unsafe-inline" not in policy
    assert "unsafe-eval" not in policy
    assert "script-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
