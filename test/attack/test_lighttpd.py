"""SECURITY.md T16 behind lighttpd: what test_proxies.py shows of nginx and
haproxy, with the request's body kept back until it is whole, and passed on
as it comes."""
import re

import pytest

import test_proxies
from peers import Process, accepts, wait_for, which
from service import free_port
from tap import bind
from test_proxies import (test_chunked_from_the_client,  # noqa: F401
                          test_exchange, test_kept_connections_never_fail,
                          test_refusal_of_a_large_body_arrives,
                          test_s11_requests_in_are_requests_out)

LIGHTTPD = """
server.modules = ( "mod_proxy", "mod_accesslog" )
accesslog.filename = "{folder}/access.log"
accesslog.format = "%s %{{X-Request-Id}}o"
server.bind = "127.0.0.1"
server.port = {port}
server.document-root = "{folder}"
server.upload-dirs = ( "{folder}" )
server.stream-request-body = {stream}
server.stream-response-body = {stream}
server.max-request-size = 2048
server.max-read-idle = 2
server.max-keep-alive-idle = 2
$HTTP["url"] =~ "" {{
    proxy.server = ( "" => (( "host" => "127.0.0.1", "port" => {service} )) )
    proxy.header = ( "map-urlpath" => ( "/livekit/jwt/" => "/" ) )
}}
"""


class Behind(test_proxies.Behind):
    """A service and lighttpd before it."""

    def __init__(self, stream, service, folder):
        self.service, self.port = service, free_port()
        self.log = folder / "access.log"
        conf = folder / "lighttpd.conf"
        conf.write_text(LIGHTTPD.format(
            service=service.port, port=self.port, folder=folder,
            stream=stream))
        self.proxy = Process([which("lighttpd"), "-D", "-f", str(conf)],
                             lambda: accepts("127.0.0.1", self.port))


@pytest.fixture(scope="module", params=[0, 2], ids=["buffered", "streamed"])
def behind(request, rig, tmp_path_factory):
    with rig.service(LIVEKIT_LOG_LEVEL="debug",
                     LKJWT_METRICS_BIND=bind()) as s:
        b = Behind(request.param, s, tmp_path_factory.mktemp("lighttpd"))
        with b.proxy:
            yield b
        assert s.stop() == 0


def test_s11_no_answer_but_to_what_the_proxy_sent(behind):
    """Last: as many as the service counted, the proxy has passed on."""
    def counted(code):
        return sum(v for k, v in behind.service.metrics().items() if re.match(
            f'lkjwt_http_requests_total.*code="{code}"', k))

    def passed_on(code):
        return len(re.findall(rf"^{code} [^-\s]", behind.log.read_text(),
                              re.M))
    for code in (401, 404, 405, 413):   # none of them is lighttpd's own
        wait_for(f"{code} in the log", lambda: (
            passed_on(code) == counted(code)))
    assert passed_on(404) > 100
