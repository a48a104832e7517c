"""Who may come in: keys, logins, other sites, other names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from corolla.errors import InvalidSetting
from corolla.gateway.database import Database
from corolla.gateway.keys import Keys
from corolla.gateway.middleware import AccessConfig, checked_url
from corolla.gateway.protocol import ConnectionLimits
from corolla.gateway.serve import check_access
from corolla.gateway.service import GatewayConfig
from tests.gateway.running import Running, TinySwarm, running

PUBLIC = {("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/api/ui/state"), ("POST", "/api/ui/login")}


@pytest.fixture(scope="module")
def closed(swarm: TinySwarm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    file = tmp_path_factory.mktemp("closed") / "gateway.sqlite"
    config = GatewayConfig(access=AccessConfig(open=False, origins=("https://friend.example",)), drain=0.5)
    with running(swarm, file, config) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def key(closed: Running) -> str:
    return closed.gateway.keys.create("alice")


def test_no_route_answers_without_a_key(closed: Running) -> None:
    with closed.client() as client:
        assert client.get("/openapi.json").status_code == 401
        routes = closed.server.config.loaded_app  # the access middleware around CORS around the application
        schema = _schema(closed)
        assert routes is not None
        asked = 0
        for path, methods in schema["paths"].items():
            for method in methods:
                answer = client.request(method.upper(), path.replace("{", "").replace("}", ""), json={})
                if (method.upper(), path) in PUBLIC:
                    assert answer.status_code != 401, path
                else:
                    assert answer.status_code == 401, (method, path, answer.text)
                    assert answer.headers["www-authenticate"] == "Bearer"
                asked += 1
        assert asked > 20
        assert client.get("/metrics", headers={"Authorization": "Bearer ck-wrong"}).status_code == 401
    with pytest.raises(InvalidStatus) as raised, connect(closed.url.replace("http", "ws") + "/api/v2/generate"):
        pass
    assert raised.value.response.status_code == 401


def _schema(closed: Running) -> dict:
    with closed.client() as client:
        key = closed.gateway.keys.create(f"schema {id(client)}")
        return client.get("/openapi.json", headers={"Authorization": f"Bearer {key}"}).json()


def test_a_key_opens_and_a_revoked_one_does_not(closed: Running) -> None:
    key = closed.gateway.keys.create("bob")
    headers = {"Authorization": f"Bearer {key}"}
    with closed.client(headers=headers) as client:
        assert client.get("/v1/models").status_code == 200
        with connect(closed.url.replace("http", "ws") + "/api/v2/generate", additional_headers=headers):
            pass
        closed.gateway.keys.revoke("bob")
        closed.wait_until(lambda: client.get("/v1/models").status_code == 401)


def test_a_login_is_a_cookie_until_it_is_left(closed: Running, key: str) -> None:
    with closed.client() as client:
        assert client.get("/api/ui/state").json()["login"] == "needed"
        assert client.post("/api/ui/login", json={"key": "ck-wrong"}).status_code == 401
        answer = client.post("/api/ui/login", json={"key": key})
        assert answer.status_code == 204
        assert "HttpOnly" in answer.headers["set-cookie"]
        assert "SameSite=strict" in answer.headers["set-cookie"]
        assert client.get("/api/ui/state").json()["login"] == "done"
        cookie = client.cookies["corolla_login"]
        assert client.post("/api/ui/logout", json={}).status_code == 204
        client.cookies.set("corolla_login", cookie)
        assert client.get("/api/ui/conversations").status_code == 401


def test_what_one_key_keeps_another_does_not_see(closed: Running, key: str) -> None:
    other = closed.gateway.keys.create("carol")
    with closed.client(headers={"Authorization": f"Bearer {key}"}) as alice:
        made = alice.post("/api/ui/conversations", json={"title": "mine"}).json()["id"]
        session = alice.get("/api/v1/open_inference_session?max_length=50").json()["session_id"]
    with closed.client(headers={"Authorization": f"Bearer {other}"}) as carol:
        assert carol.get("/api/ui/conversations").json()["conversations"] == []
        assert carol.get(f"/api/ui/conversations/{made}").status_code == 404
        assert carol.get(f"/api/v1/close_inference_session?session_id={session}").status_code == 404


def test_a_rate_holds(closed: Running) -> None:
    key = closed.gateway.keys.create("slow", rate=3)
    with closed.client(headers={"Authorization": f"Bearer {key}"}) as client:
        answers = [client.get("/v1/models") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert int(answers[-1].headers["retry-after"]) >= 1
    assert answers[-1].json()["error"]["type"] == "rate_limit_error"


def test_other_sites_may_not_call_unless_they_are_named(closed: Running, key: str, client: httpx2.Client) -> None:
    assert client.post("/api/ui/conversations", json={}, headers={"Origin": "https://evil.example"}).status_code == 403
    assert client.post("/api/ui/conversations", json={}, headers={"Origin": str(client.base_url).rstrip("/")}).status_code == 201
    headers = {"Authorization": f"Bearer {key}"}
    with closed.client(headers=headers) as named:
        friend = named.get("/v1/models", headers={"Origin": "https://friend.example"})
        assert friend.headers["access-control-allow-origin"] == "https://friend.example"
        assert "access-control-allow-origin" not in named.get("/v1/models", headers={"Origin": "https://evil.example"}).headers
    with (
        pytest.raises(InvalidStatus),
        connect(closed.url.replace("http", "ws") + "/api/v2/generate", origin="https://evil.example", additional_headers=headers),
    ):
        pass


def test_an_open_gateway_answers_as_localhost_alone(client: httpx2.Client) -> None:
    assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert client.get("/v1/models", headers={"Host": "localhost:1"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "["},
        {"Host": "[::1"},
        {"Host": "localhost:99999999"},
        {"Host": "localhost:x"},
        {"Host": "localhost/path"},
        {"Host": "user@localhost"},
        {"Host": "a" * 5000},
        {"Host": ""},
        {"Host": "l\u00f6calhost".encode()},
        {"Origin": "http://["},
        {"Origin": "http://localhost:8000/path"},
        {"Origin": "//localhost"},
        {"Origin": ""},
        {"Origin": "http://" + "a" * 5000},
        {"Origin": "http://l\u00f6calhost".encode()},
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_is_no_host_and_no_origin_is_a_bad_request(client: httpx2.Client, method: str, headers: dict) -> None:
    answer = client.request(method, "/api/ui/state", headers=headers)
    assert (answer.status_code, answer.json()["error"]["kind"]) == (400, "BadRequest")


@given(st.sampled_from(["Host", "Origin"]), st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=40))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_host_and_origin_is_answered(client: httpx2.Client, name: str, value: str) -> None:
    assert client.post("/api/ui/logout", json={}, headers={name: value.encode("latin-1")}).status_code in (204, 400, 403)


CROSS_SITE = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},  # another port of localhost
    {"User-Agent": "Mozilla/5.0 (a browser that reached it over plain HTTP)"},
]


@pytest.mark.parametrize("headers", CROSS_SITE)
def test_no_cross_site_request_changes_a_session(client: httpx2.Client, headers: dict[str, str]) -> None:
    assert client.get("/api/v1/open_inference_session?max_length=64", headers=headers).status_code == 403
    mine = client.get("/api/v1/open_inference_session?max_length=64").json()["session_id"]
    assert client.get(f"/api/v1/close_inference_session?session_id={mine}", headers=headers).status_code == 403
    assert client.get(f"/api/v1/close_inference_session?session_id={mine}").status_code == 200
    assert client.get("/v1/models", headers=headers).status_code == 200  # nothing is changed, and the site cannot read it


@pytest.mark.parametrize("headers", CROSS_SITE[:4])
@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded", "text/plain"])
def test_no_form_of_another_site_is_taken(client: httpx2.Client, headers: dict[str, str], kind: str) -> None:
    for path in ("/api/v1/generate", "/api/ui/conversations", "/api/ui/login", "/v1/completions", "/nothing"):
        assert client.post(path, content=b"inputs=x&max_new_tokens=1", headers={**headers, "Content-Type": kind}).status_code == 403


def test_a_page_of_its_own_may_change_a_session(client: httpx2.Client) -> None:
    own = {"User-Agent": "Mozilla/5.0", "Sec-Fetch-Site": "same-origin"}
    assert client.get("/api/v1/open_inference_session?max_length=64", headers=own).status_code == 200


def test_behind_a_named_proxy_cookies_are_secure(
    swarm: TinySwarm, tmp_path: Path, closed: Running, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    with closed.client() as client:
        forwarded = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.9"}
        assert "Secure" not in client.post("/api/ui/login", json={"key": key}, headers=forwarded).headers["set-cookie"]
    access = AccessConfig(open=False, public_url=checked_url("https://chat.example.org/"))
    config = GatewayConfig(access=access, connections=ConnectionLimits(proxies=("127.0.0.1",), of_one=2), drain=0.1)
    with running(swarm, tmp_path / "g.sqlite", config) as gateway, gateway.client() as client:
        own = gateway.gateway.keys.create("alice")
        site = {"Origin": "https://chat.example.org", "Host": "backend:80"}
        with caplog.at_level("INFO"):
            answer = client.post("/api/ui/login", json={"key": own}, headers={**site, **forwarded})
            assert answer.status_code == 204, answer.text
            assert "Secure" in answer.headers["set-cookie"]
            gateway.wait_until(lambda: [each.client for each in caplog.records if each.name == "corolla.access"] == ["203.0.113.9"])
        assert client.post("/api/ui/login", json={"key": own}, headers={**site, "Origin": "https://evil.example"}).status_code == 403


@pytest.mark.parametrize("url", ["chat.example.org", "ftp://x", "https://x/path", "https://[", "https://x:y", ""])
def test_a_public_url_is_checked(url: str) -> None:
    with pytest.raises(InvalidSetting, match="public-url"):
        checked_url(url)


def test_every_response_has_the_headers_that_a_page_needs(client: httpx2.Client) -> None:
    for path in ("/", "/healthz", "/v1/models", "/nothing.js"):
        headers = client.get(path).headers
        assert "script-src 'self'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_others_come_in_only_with_keys_or_when_it_is_said(tmp_path: Path) -> None:
    database = Database(str(tmp_path / "gateway.sqlite"))
    keys = Keys(database)
    assert check_access("127.0.0.1", keys, open_to_all=False)
    assert check_access("0.0.0.0", keys, open_to_all=True)
    with pytest.raises(InvalidSetting, match="corolla keys create"):
        check_access("0.0.0.0", keys, open_to_all=False)
    with pytest.raises(InvalidSetting, match=r"others reach https://chat\.example\.org"):
        check_access("127.0.0.1", keys, open_to_all=False, public_url="https://chat.example.org")
    key = keys.create("alice")
    assert not check_access("0.0.0.0", keys, open_to_all=False)
    assert not check_access("127.0.0.1", keys, open_to_all=False)
    assert key.encode() not in (tmp_path / "gateway.sqlite").read_bytes()
    with pytest.raises(InvalidSetting, match="already"):
        keys.create("alice")
    with pytest.raises(InvalidSetting, match="no key"):
        keys.revoke("bob")
    database.close()
