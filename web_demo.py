#!/usr/bin/env python3
"""A web page to chat with ChatGLM2 weights, or with the toy checkpoint that this repository carries.

    pip install "gradio>=6.31,<7"
    python web_demo.py                                    # the toy checkpoint, at http://127.0.0.1:7860
    python web_demo.py --model ../chatglm2-6b --quantize 4 --host 0.0.0.0

Labels are Chinese or English, as the browser asks for. The page holds the conversation and sends it with each question;
the server keeps nothing between two answers, so users cannot meet, and a reload begins anew.
"""

from contextlib import closing
from pathlib import Path

import gradio as gr

from cli_demo import TOY, chat_parser, load_or_exit

LABELS = gr.I18n(
    en={
        "conversation": "Conversation",
        "toy": "<center>This toy knows the dialogues of `examples/tiny/dialogues.jsonl` by heart.<br>"
        "Try Hello, 你好 or 讲个笑话, and clear the page before another one.</center>",
        "placeholder": "Ask something. Enter sends, Shift+Enter begins a new line.",
        "settings": "Settings",
        "temperature": "Temperature (0: greedy)",
        "max_new_tokens": "Max new tokens",
    },
    zh={
        "conversation": "对话",
        "toy": "<center>这个演示模型只背下了 `examples/tiny/dialogues.jsonl` 里的对话。<br>"
        "试试“你好”“讲个笑话”或 Hello，换一段对话前请先清空。</center>",
        "placeholder": "请输入问题。回车发送，Shift+回车换行。",
        "settings": "参数",
        "temperature": "温度（0：贪心）",
        "max_new_tokens": "最多生成 token 数",
    },
)
LATEX = [  # as ChatGLM2 writes formulas, the last above all; two prices in dollars in one line pass for a formula, too
    {"left": left, "right": right, "display": display}
    for left, right, display in (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False), ("$", "$", False))
]


def parse_arguments(arguments=None):
    parser = chat_parser(__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 serves the whole network")
    parser.add_argument("--port", type=int, default=None, help="(default: the first free one from 7860 on)")
    parser.add_argument("--share", action="store_true", help="open a public address too, through gradio's tunnel")
    # One, because nothing batches answers in progress: side by side each takes longer, and holds its own cache (up to
    # 0.94 GB of float16 for the 32768 tokens of ChatGLM2-6B).
    parser.add_argument("--concurrency", type=int, default=1, help="answers at a time; other questions queue")
    args = parser.parse_args(arguments)
    if args.concurrency < 1:
        parser.error(f"--concurrency {args.concurrency} would never answer: give 1 or more.")
    return args


def message(role, text):
    """A message as gr.Chatbot holds it. Given as a bare string, it would lose its indentation."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def text_of(message):
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def rounds_of(messages):
    """[(query, answer)]. A question without an answer, stopped before it began or refused, is left out."""
    pairs = zip(messages, messages[1:])
    return [(text_of(a), text_of(b)) for a, b in pairs if (a["role"], b["role"]) == ("user", "assistant")]


def build(model, tokenizer, args):
    """The page. gr.ChatInterface would be shorter, but cannot stop the answer to an edited question."""

    def ask(query, messages):
        if not query.strip():
            raise gr.Error("Type a message first. / 请先输入消息。", print_exception=False)
        return [*messages, message("user", query)], *busy()

    def ask_again(messages):
        while messages[-1]["role"] == "assistant":
            messages.pop()
        return messages, *busy()

    def edit(messages, edited: gr.EditData):
        return [*messages[: edited.index], message("user", edited.value)], *busy()

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
            with closing(steps):  # gradio closes this generator when the user stops it, clears or leaves the page
                for text, _ in steps:
                    yield [*messages, message("assistant", text)]
        except ValueError as error:  # a conversation that has become too long, for example
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    def busy():
        return gr.Textbox("", interactive=False, submit_btn=False, stop_btn=True), False

    def ready(cleared):  # its outputs name the conversation as well, which takes gradio's "Error" off it
        conversation = [] if cleared else gr.skip()
        return conversation, gr.Textbox(interactive=True, submit_btn=True, stop_btn=False), False

    room = model.config.seq_length
    with gr.Blocks(title="ChatGLM2", analytics_enabled=False, fill_height=True) as page:
        chatbot = gr.Chatbot(
            label=LABELS("conversation"),
            placeholder=LABELS("toy") if Path(args.model).resolve() == TOY else None,
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
            limit = args.max_new_tokens or min(2048, room // 2)
            max_new_tokens = gr.Slider(1, room, limit, step=1, label=LABELS("max_new_tokens"))

        # What the model says until it hears of "Clear" brings the conversation back; `ready`, which comes after it all,
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
        for event in (asked, *answers):  # a stopped answer counts as failed, too
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
