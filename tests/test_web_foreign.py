"""Nothing foreign is fetched by the page of demos/web_demo.py, whatever a question or an answer holds."""

import socket
import threading

import pytest
from sessions import Progress

pytestmark = pytest.mark.tools

# Each names URL. The last three are for gradio's sanitizer: no policy forbids a preconnect or a refresh.
MESSAGES = [
    "![t](URL/markdown) ![t][r]\n\n[r]: URL/reference",
    '<img src="URL/img"><img srcset="URL/srcset 2x"><picture><source srcset="URL/source"><img></picture>',
    '<div style="background: url(URL/style)">a</div><table background="URL/table"><tr><td>a</td></tr></table>',
    "<style>@import url(URL/import); body { background: url(URL/css); font-family: f }"
    " @font-face { font-family: f; src: url(URL/font) }</style>",
    '<link rel="stylesheet" href="URL/sheet"><link rel="prefetch" href="URL/prefetch">',
    '<link rel="icon" href="URL/icon"><link rel="preload" as="image" href="URL/preload">',
    '<link rel="modulepreload" href="URL/module">',
    '<svg width="9" height="9"><image href="URL/image" width="9" height="9"/><use href="URL/use#a"/></svg>',
    '<svg><filter id="f"><feImage href="URL/filter"/></filter><rect filter="url(#f)" width="9" height="9"/></svg>',
    '<iframe src="URL/frame"></iframe><iframe srcdoc="<img src=URL/srcdoc>"></iframe>',
    '<object data="URL/object"></object><embed src="URL/embed"><video src="URL/video" poster="URL/poster"></video>',
    '<audio src="URL/audio" autoplay></audio><video><source src="URL/clip"><track src="URL/track" default></video>',
    '<input type="image" src="URL/input">',
    '<script src="URL/script"></script><img src=x onerror="fetch(\'URL/fetch\')">',
    '<base href="URL/base/"><img src="relative">',
    "```mermaid\ngraph TD; A@{ img: 'URL/diagram', w: 60, h: 60 } --> B;\n```",
    r"\(\includegraphics{URL/formula}\) $\htmlStyle{background: url(URL/formula)}{a}$",
    "![t](/gradio_api/file=URL/file) ![t](//HOST/scheme)",
    '<link rel="preconnect" href="URL/preconnect"><link rel="dns-prefetch" href="URL/dns">',
    '<meta http-equiv="refresh" content="0; url=URL/refresh">',
    '<form action="URL/form"><input name="a"></form><script>document.forms[0].submit()</script>',
]


@pytest.fixture
def foreign():
    """(the address of a server on another port, the connections that were made to it)."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:  # closed
                    return
                connection.settimeout(1)
                with connection:
                    try:
                        asked.append(connection.recv(200).split(b"\r\n")[0].decode(errors="replace"))
                    except OSError:
                        asked.append("a connection without a request")

        thread = threading.Thread(target=listen)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def filled(message, url):
    return message.replace("URL", url).replace("HOST", url.removeprefix("http://"))


def echo(key, query, history, system, **settings):
    """A model that answers with the question."""
    yield Progress(query, 0, 0, 0, 0)


@pytest.fixture(params=[False, True], ids=["with the policy", "without"])
def allowed(request, monkeypatch):
    """Whether the page is served without its policy."""
    import web_demo

    if request.param:
        monkeypatch.setattr(web_demo, "HEADERS", {})
    return request.param


@pytest.fixture
def chat(serve, open_chat, allowed):
    """The page of a model that answers with the question."""
    return open_chat(serve(stream=echo).url)


def test_nothing_foreign_in_messages(chat, foreign, allowed):
    """Images, styles, links, SVG, frames, in questions and answers: no connection. Without the policy there are."""
    url, asked = foreign
    for i in range(3):
        chat.ask(filled("\n\n".join(MESSAGES[i::3]), url))
        chat.wait_until(lambda n=i + 1: len(chat.texts("bot")) == n, "no answer")
        chat.wait_until_ready()
    chat.page.wait_for_timeout(500)
    assert chat.page.locator(".message.bot img").count() > 3
    assert len(set(asked)) > 10 if allowed else not asked, asked


def test_nothing_foreign_in_the_document(chat, foreign, allowed):
    """What would slip through a sanitizer is not fetched either."""
    url, asked = foreign
    for message in MESSAGES[:-3]:
        chat.page.evaluate(
            """html => { const all = document.createRange().createContextualFragment(html);
            document.body.append(all); }""",
            filled(message, url),
        )
    chat.page.wait_for_timeout(500)
    assert len(set(asked)) > 20 if allowed else not asked, asked
