#!/usr/bin/env python3
"""Chat in the browser with ChatGLM2 weights, or with the tiny checkpoint of this repository.

    pip install "gradio>=6.31,<7"
    python demos/web_demo.py                                    # the tiny checkpoint, at http://127.0.0.1:7860
    python demos/web_demo.py --model chatglm2-6b --quantize 4 --host 0.0.0.0

Labels are in Chinese or English, by the browser's language. The page holds the conversation and sends it with each
question; the server keeps nothing between two answers. A reload starts a new conversation.
"""

import sys
from contextlib import closing
from pathlib import Path

import gradio as gr

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lib"))
from chatglm2.tokenization_chatglm import check_unicode
from checkpoints import TINY
from options import chat_parser, load_or_exit

LABELS = gr.I18n(
    en={
        "conversation": "Conversation",
        "tiny": "<center>The tiny checkpoint has memorized `examples/tiny/dialogues.jsonl` and knows nothing else.<br>"
        "Try Hello, 你好 or 讲个笑话, and clear the page before another dialogue.</center>",
        "placeholder": "Ask something. Enter sends, Shift+Enter starts a new line.",
        "settings": "Settings",
        "temperature": "Temperature (0: greedy)",
        "max_new_tokens": "Max new tokens",
    },
    zh={
        "conversation": "对话",
        "tiny": "<center>这个演示模型只背下了 `examples/tiny/dialogues.jsonl` 里的对话。<br>"
        "试试“你好”“讲个笑话”或 Hello，换一段对话前请先清空。</center>",
        "placeholder": "请输入问题。回车发送，Shift+回车换行。",
        "settings": "参数",
        "temperature": "温度（0：贪心）",
        "max_new_tokens": "最多生成 token 数",
    },
)
LATEX = [  # ChatGLM2 mostly writes the last; two prices in dollars on one line are taken for a formula, too
    {"left": left, "right": right, "display": display}
    for left, right, display in (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False), ("$", "$", False))
]


def parse_arguments(arguments=None):
    parser = chat_parser(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 serves the whole network")
    parser.add_argument("--port", type=int, default=None, help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="also open a public address, through gradio's tunnel")
    # One by default: answers are not batched, so each of several takes longer and holds its own cache (up to 0.94 GB of
    # float16 for the 32768 tokens of ChatGLM2-6B).
    parser.add_argument("--concurrency", type=int, default=1, help="answers at a time; other questions wait")
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


def rounds_of(messages):
    """[(query, answer)], without questions that have no answer: it was stopped before it began, or refused."""
    pairs = zip(messages, messages[1:])
    return [(text_of(a), text_of(b)) for a, b in pairs if (a["role"], b["role"]) == ("user", "assistant")]


def build(model, tokenizer, args):
    """The page. gr.ChatInterface is shorter, but cannot stop the answer to an edited question."""

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

    def answer(messages, temperature, top_p, max_new_tokens):
        *before, question = messages
        steps = model.stream_chat(
            tokenizer,
            text_of(question),
            rounds_of(before),
            do_sample=temperature > 0,
            temperature=float(temperature),
            top_p=float(top_p),
            max_new_tokens=max_new_tokens,
        )
        try:
            with closing(steps):  # gradio closes this generator when the user stops it, clears the page or leaves
                for text, _ in steps:
                    yield [*messages, message("assistant", text)]
        except ValueError as error:  # for example, the conversation is too long
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    def busy():
        return gr.Textbox("", interactive=False, submit_btn=False, stop_btn=True), False

    def ready(cleared):  # the conversation is among its outputs, which removes gradio's "Error" from it
        conversation = [] if cleared else gr.skip()
        return conversation, gr.Textbox(interactive=True, submit_btn=True, stop_btn=False), False

    longest = model.config.seq_length
    with gr.Blocks(title="ChatGLM2", analytics_enabled=False, fill_height=True) as page:
        chatbot = gr.Chatbot(
            label=LABELS("conversation"),
            placeholder=LABELS("tiny") if Path(args.model).resolve() == TINY else None,
            editable="user",
            latex_delimiters=LATEX,
            buttons=["copy", "copy_all"],
            scale=1,
        )
        box = gr.Textbox(
            placeholder=LABELS("placeholder"), show_label=False, submit_btn=True, max_lines=10, autofocus=True
        )
        with gr.Accordion(LABELS("settings"), open=False), gr.Row():
            temperature = gr.Slider(0, 2, args.temperature, step=0.05, label=LABELS("temperature"))
            top_p = gr.Slider(0.05, 1, args.top_p, step=0.05, label="Top-p")
            limit = args.max_new_tokens or min(2048, longest // 2)
            max_new_tokens = gr.Slider(1, longest, limit, step=1, label=LABELS("max_new_tokens"))

        # Text that arrives after "Clear", before the model stops, restores the conversation: `ready`, which runs last,
        # has to empty the page again.
        cleared = gr.Checkbox(visible=False)

        state, hidden = [chatbot, box, cleared], {"api_visibility": "private", "show_progress": "hidden"}
        asked = box.submit(ask, [box, chatbot], state, **hidden)
        asked_again = chatbot.retry(ask_again, chatbot, state, **hidden)
        edited = chatbot.edit(edit, chatbot, state, **hidden)
        answers = [
            event.success(
                answer,
                [chatbot, temperature, top_p, max_new_tokens],
                chatbot,
                show_progress="minimal",  # the place in the queue
                concurrency_id="model",
                concurrency_limit=args.concurrency,
                api_name="chat",
                api_visibility="public" if event is asked else "private",
            )
            for event in (asked, asked_again, edited)
        ]
        for event in answers:
            event.success(ready, cleared, state, **hidden)
        for event in (asked, *answers):  # a stopped answer counts as a failure
            event.failure(ready, cleared, state, **hidden)
        box.stop(None, cancels=answers)
        chatbot.clear(None, None, cleared, js="() => true", cancels=answers)
    return page


def main(arguments=None):
    args = parse_arguments(arguments)
    page = build(*load_or_exit(args), args)
    page.launch(
        server_name=args.host,
        server_port=args.port,
        share=args.share,
        i18n=LABELS,
        show_error=True,
        run_history=False,
        ssr_mode=False,
    )


if __name__ == "__main__":
    main()
