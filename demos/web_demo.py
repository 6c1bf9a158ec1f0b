#!/usr/bin/env python3
"""Chat in the browser with ChatGLM2 weights, or with the tiny checkpoint of this repository.

    pip install "gradio>=6.31,<7"
    python demos/web_demo.py                                    # the tiny checkpoint, at http://127.0.0.1:7860
    python demos/web_demo.py --model chatglm2-6b --quantize 4 --host 0.0.0.0

Labels are in Chinese or English, by the browser's language. The page holds the conversation and sends it with each
question; the server keeps the keys and values of each open page, so that a turn encodes only itself, and writes nothing
to a disk. A reload starts a new conversation.
"""

import sys
from contextlib import closing
from pathlib import Path
from typing import Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from starting import importing

with importing("web"):
    import gradio as gr
    from chatglm2.tokenization_chatglm import check_unicode
    from checkpoints import TINY, held_in
    from conversations import read_conversation, rounds_of, written
    from options import chat_parser, load_or_exit
    from sessions import Sessions
    from starlette.middleware import Middleware

LABELS = gr.I18n(
    en={
        "tiny": "<center>The tiny checkpoint has memorized examples/tiny/dialogues.jsonl and knows nothing else.<br>"
        "Clear the page before another dialogue.</center>",
        "placeholder": "Ask something. Enter sends, Shift+Enter starts a new line.",
        "settings": "Settings",
        "temperature": "Temperature (0: greedy)",
        "max_new_tokens": "Max new tokens",
        "system": "System prompt",
        "system_info": "Instructions in front of the conversation. The released models were not trained with any.",
        "export": "Export",
        "import": "Import",
    },
    zh={
        "tiny": "<center>这个演示模型只背下了 examples/tiny/dialogues.jsonl 里的对话。<br>"
        "换一段对话前请先清空。</center>",
        "placeholder": "请输入问题。回车发送，Shift+回车换行。",
        "settings": "参数",
        "temperature": "温度（0：贪心）",
        "max_new_tokens": "最多生成 token 数",
        "system": "系统提示词",
        "system_info": "放在整段对话之前的指令。已发布的模型训练时没有用过系统提示词。",
        "export": "导出",
        "import": "导入",
    },
)
STATUS = {  # with figures, which LABELS cannot have
    "en": "First token after {:.1f} s, then {:.1f} tokens/s. Context: {:,} of {:,} tokens, {:,} encoded in this turn.",
    "zh": "首个 token 用时 {:.1f} 秒，之后每秒 {:.1f} 个。上下文 {:,} / {:,} token，本轮新编码 {:,} 个。",
}
LATEX = [  # ChatGLM2 mostly writes the last; two prices in dollars on one line are taken for a formula, too
    {"left": left, "right": right, "display": display}
    for left, right, display in (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False), ("$", "$", False))
]

EXAMPLES = ["你好", "讲个笑话", "Hello", "what is the sun"]  # the tiny checkpoint knows their answers

# The file never reaches the server's disk: the browser writes it, and sends its text when it is read.
DOWNLOAD = """text => {
    const blob = new Blob([text], {type: "application/json"});
    Object.assign(document.createElement("a"), {download: "chat.json", href: URL.createObjectURL(blob)}).click();
}"""
IMPORT = """() => new Promise(resolve => {
    const input = Object.assign(document.createElement("input"), {type: "file", accept: ".json"});
    input.onchange = async () => resolve([await input.files[0].text()]);
    input.oncancel = () => resolve([null]);
    input.click();
})"""

# What gradio's sanitizer leaves of a message, as images, may name any address: the browser is to ask this server only.
# The page's own code needs inline scripts, eval and inline styles.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; frame-src 'none'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'"
)
HEADERS = {"content-security-policy": POLICY, "x-dns-prefetch-control": "off"}


class SameOrigin:
    """ASGI middleware that sends HEADERS with every response."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await self.app(scope, receive, send_with_headers)


def parse_arguments(arguments=None):
    parser = chat_parser(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 serves the whole network")
    parser.add_argument("--port", type=int, default=None, help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="also open a public address, through gradio's tunnel")
    # One by default: answers are not batched, so each of several takes longer and holds its own cache (up to 0.94 GB of
    # float16 for the 32768 tokens of ChatGLM2-6B).
    parser.add_argument("--concurrency", type=int, default=1, help="answers at a time; other questions wait")
    parser.add_argument("--cached-chats", type=int, default=16, help="open pages whose keys and values are kept")
    parser.add_argument("--cache-gb", type=float, default=2, help="memory for them between answers (default: 2)")
    args = parser.parse_args(arguments)
    if args.concurrency < 1:
        parser.error(f"--concurrency {args.concurrency} would never answer: give 1 or more.")
    return args


def message(role, text):
    """A message as gr.Chatbot stores it. As a plain string it would lose its indentation."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def question(text):
    """The user's message; what the page cannot send back is refused here."""
    try:
        check_unicode(text, "the message")
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
    return message("user", text)


def text_of(message):
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def name_of(args, model):
    """The folder, what its weights are held in, and where."""
    return f"{Path(args.model).resolve().name} · {held_in(model)} · {model.device}"


def build(sessions, args):
    """The page. gr.ChatInterface is shorter, but cannot stop the answer to an edited question."""
    drafts = {"prompt_lookup_num_tokens": 10} if args.prompt_lookup else {}
    longest, tiny = sessions.model.config.seq_length, Path(args.model).resolve() == TINY

    def ask(query, messages):
        if not query.strip():
            raise gr.Error("Type a message first. / 请先输入消息。", print_exception=False)
        return [*messages, question(query)], *busy()

    def ask_again(messages):
        while messages[-1]["role"] == "assistant":
            messages.pop()
        return messages, *busy()

    def edit(messages, edited: gr.EditData):
        return [*messages[: edited.index], question(edited.value)], *busy()

    def choose(messages, chosen: gr.SelectData):
        return [*messages, message("user", chosen.value["text"])], *busy()

    def answer(messages, temperature, top_p, max_new_tokens, system, request: gr.Request):
        *before, question = messages
        words = STATUS["zh" if request.headers.get("accept-language", "").startswith("zh") else "en"]
        steps = sessions.stream(
            request.session_hash,
            text_of(question),
            rounds_of([(message["role"], text_of(message)) for message in before]),
            system.strip(),
            temperature=float(temperature),
            top_p=float(top_p),
            max_new_tokens=max_new_tokens,
            **drafts,
        )
        try:
            with closing(steps):  # gradio closes this generator when the user stops it, clears the page or leaves
                for step in steps:
                    status = words.format(step.first, step.rate, step.context, longest, step.encoded)
                    yield [*messages, message("assistant", step.text)], status
        except ValueError as error:  # for example, the conversation is too long
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    def busy():
        return gr.Textbox("", interactive=False, submit_btn=False, stop_btn=True), False, gr.Button(interactive=False)

    def ready(cleared):  # the conversation is among its outputs, which removes gradio's "Error" from it
        conversation = [] if cleared else gr.skip()
        box = gr.Textbox(interactive=True, submit_btn=True, stop_btn=False)
        return conversation, box, False, gr.Button(interactive=True)

    def export(messages, system):
        form, turns = sessions.tokenizer.conversation, [(message["role"], text_of(message)) for message in messages]
        opening = form.offer(sessions.tools, system.strip()) if sessions.tools else []
        question = turns[-1][1] if turns and turns[-1][0] == "user" else None
        history = [*opening, *form.from_rounds(rounds_of(turns))]
        return written(form, history, "" if opening else system, question)

    def load(text: Optional[str]):
        if text is None:  # the dialog was closed
            return gr.skip(), gr.skip()
        try:
            system, messages = read_conversation(text)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return [message(role, content) for role, content in messages], system

    def forget(request: gr.Request):
        sessions.drop(request.session_hash)

    with gr.Blocks(title="ChatGLM2", analytics_enabled=False, fill_height=True) as page:
        chatbot = gr.Chatbot(
            label=name_of(args, sessions.model),
            placeholder=LABELS("tiny") if tiny else None,
            examples=[{"text": text} for text in EXAMPLES] if tiny else None,
            editable="user",
            latex_delimiters=LATEX,
            buttons=["copy", "copy_all"],
            scale=1,
        )
        box = gr.Textbox(
            placeholder=LABELS("placeholder"), show_label=False, submit_btn=True, max_lines=10, autofocus=True
        )
        status = gr.Markdown(elem_id="status")
        with gr.Accordion(LABELS("settings"), open=False):
            system = gr.Textbox("", label=LABELS("system"), info=LABELS("system_info"), max_lines=5)
            with gr.Row():
                temperature = gr.Slider(0, 2, args.temperature, step=0.05, label=LABELS("temperature"))
                top_p = gr.Slider(0.05, 1, args.top_p, step=0.05, label="Top-p")
                limit = args.max_new_tokens or min(2048, longest // 2)
                max_new_tokens = gr.Slider(1, longest, limit, step=1, label=LABELS("max_new_tokens"))
            with gr.Row():
                save, read = gr.Button(LABELS("export"), size="sm"), gr.Button(LABELS("import"), size="sm")
        text = gr.Textbox(visible=False)  # of a file

        # Text that arrives after "Clear", before the model stops, restores the conversation: `ready`, which runs last,
        # has to empty the page again.
        cleared = gr.Checkbox(visible=False)

        state, hidden = [chatbot, box, cleared, read], {"api_visibility": "private", "show_progress": "hidden"}
        asked = box.submit(ask, [box, chatbot], state, **hidden)
        asked_again = chatbot.retry(ask_again, chatbot, state, **hidden)
        edited = chatbot.edit(edit, chatbot, state, **hidden)
        chosen = chatbot.example_select(choose, chatbot, state, **hidden)
        answers = [
            event.success(
                answer,
                [chatbot, temperature, top_p, max_new_tokens, system],
                [chatbot, status],
                show_progress="minimal",  # the place in the queue
                show_progress_on=chatbot,
                concurrency_id="model",
                concurrency_limit=args.concurrency,
                api_name="chat",
                api_visibility="public" if event is asked else "private",
            )
            for event in (asked, asked_again, edited, chosen)
        ]
        for event in answers:
            event.success(ready, cleared, state, **hidden)
        for event in (asked, *answers):  # a stopped answer counts as a failure
            event.failure(ready, cleared, state, **hidden)
        box.stop(None, cancels=answers)
        chatbot.clear(None, None, [cleared, status], js="() => [true, '']", cancels=answers)
        chatbot.clear(forget, **hidden)
        save.click(export, [chatbot, system], text, **hidden).success(None, text, js=DOWNLOAD)
        read.click(load, text, [chatbot, system], js=IMPORT, **hidden)
        page.unload(forget)
    return page


def launch(page, **options):
    middleware = [Middleware(SameOrigin)]
    page.launch(
        i18n=LABELS,
        show_error=True,
        run_history=False,
        ssr_mode=False,
        app_kwargs={"middleware": middleware},
        **options,
    )


def main(arguments=None):
    args = parse_arguments(arguments)
    model, tokenizer = load_or_exit(args)
    print(f"{args.model}: {held_in(model)}, on {model.device}.", flush=True)
    try:
        sessions = Sessions(model, tokenizer, args.cached_chats, int(args.cache_gb * 1e9), args.tools)
    except ValueError as error:
        raise SystemExit(f"--tools: {error}") from None
    page = build(sessions, args)
    launch(page, server_name=args.host, server_port=args.port, share=args.share)


if __name__ == "__main__":
    main()
