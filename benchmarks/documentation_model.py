"""Train a model to measure on: a ChatGLM2 of 10 million parameters on real text, without rounding in mind.

    python benchmarks documentation_model build/documentation --seed 0
    python benchmarks perplexity --model build/documentation/0 --text build/documentation/held_back.txt \\
        --calibration build/documentation/train.txt

The text is the documentation in Chinese and English of the Debian 12 packages that `PACKAGES` names; apt-get fetches
them. FOLDER then holds it in two parts, `train.txt` and whole documents that no model sees, `held_back.txt`, and a
folder for each seed. Training takes --minutes of processor time of a core and is saved every five of them.
"""

import gzip
import hashlib
import math
import random
import re
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import torch
from common import ROOT

PACKAGES = {  # Debian package -> the files that are read; behind it the licence of most of them
    "libreoffice-help-zh-cn": r"text/.*\.html$",  # MPL-2.0
    "libreoffice-help-en-us": r"text/.*\.html$",
    "gimp-help-zh-cn": r"\.html$",  # GFDL-1.2+
    "gimp-help-en": r"\.html$",
    "gnome-user-docs": r"help/(C|zh_CN)/.*\.page$",  # CC-BY-SA-3.0
    "debian-handbook": r"html/(en-US|zh-CN)/.*\.html$",  # GPL-2+ or CC-BY-SA-3.0
    "debian-reference-zh-cn": r"\.zh-cn\.html$",  # GPL-2+
    "debian-reference-en": r"\.en\.html$",
    "debian-faq-zh-cn": r"\.html$",  # copies and changes under the same terms
    "debian-faq": r"\.en\.html$",
    "debian-edu-doc-zh-cn": r"bookworm.*\.html$",  # GPL-2+
    "maint-guide-zh-cn": r"\.html$",  # GPL-2+
    "kicad-doc-zh": r"\.html$",  # GPL-3+
    "kicad-doc-en": r"\.html$",
    "lilypond-doc-html-zh": r"\.zh\.html$",  # GFDL-1.3+
    "manpages-zh": r"man/zh_CN/.*\.gz$",  # GFDL-1.2+, GPL-2+
    "manpages": r"man/man.*\.gz$",  # Linux-man-pages-copyleft, GPL-2+
    "fortunes-zh": r"(tang300|song100|chinese)$",  # GPL-3+
}
SHAPE = {
    "num_layers": 5,
    "hidden_size": 384,
    "ffn_hidden_size": 896,
    "num_attention_heads": 12,
    "kv_channels": 32,
    "multi_query_group_num": 2,
    "seq_length": 2048,
}
LENGTH, BATCH = 256, 8  # tokens of an example, examples of a step


def arguments(parser):
    parser.add_argument("folder", type=Path, help="for packages, text and models")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the examples' order")
    parser.add_argument("--minutes", type=float, default=90, help="of training (default: 90)")
    parser.add_argument("--vocab-size", type=int, default=6000)
    parser.add_argument("--layers", type=int, default=SHAPE["num_layers"])
    parser.add_argument("--threads", type=int)


# ---- the text -------------------------------------------------------------------------------------------------------


class Paragraphs(HTMLParser):
    """The text of an HTML or XML page, one paragraph a line."""

    BREAKS = {*"p li td th h1 h2 h3 h4 h5 dt dd pre div br title tr item".split()}
    IGNORED = {"script", "style", "head", "info", "nav"}

    def __init__(self, text):
        super().__init__()
        self.text, self.ignored = [""], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.ignored += tag in self.IGNORED
        if tag in self.BREAKS:
            self.text.append("")

    def handle_endtag(self, tag):
        self.ignored -= tag in self.IGNORED and self.ignored > 0
        if tag in self.BREAKS:
            self.text.append("")

    def handle_data(self, data):
        if not self.ignored:
            self.text[-1] += data


def manual_page(text):
    """The words of a page in roff, one paragraph a line."""
    text = re.sub(r'^[.\'](\\"|TH|de|ie|el|if|ad|nh|so|ds|nr).*', "", text, flags=re.M)
    text = re.sub(r"^\.(SH|SS|PP|TP|LP|IP|P|HP|sp|br)\b ?(.*)$", r"\n\n\2\n", text, flags=re.M)
    text = re.sub(r"^\.[A-Za-z]+ ?", "", text, flags=re.M)
    text = re.sub(r"\\f\(?[A-Z]{1,2}|\\f\[\w*\]|\\[&/,|^cd]|\\s[-+]?\d", "", text)
    text = text.replace(r"\-", "-").replace(r"\ ", " ").replace(r"\e", "\\").replace('"', "")
    return [" ".join(part.split("\n")) for part in text.split("\n\n")]


def read(path):
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode("utf-8", "ignore")
    if path.suffix == ".gz":
        return manual_page(text)
    if path.suffix in (".html", ".page"):
        return Paragraphs(text).text
    return re.sub(r"\x1b\[[\d;]*m", "", text).split("\n%\n")


def documents(folder):
    """[text] of every file in the packages, without the paragraphs that stand in several files."""
    found, seen = [], set()
    for package, pattern in PACKAGES.items():
        target = folder / package
        if not target.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
            subprocess.run(["dpkg", "-x", next(folder.glob(f"{package}_*.deb")), target], check=True)
        count = 0
        for path in sorted(target.rglob("*")):
            if not path.is_file() or not re.search(pattern, str(path)):
                continue
            paragraphs = []
            for paragraph in read(path):
                paragraph = re.sub(r"\s+", " ", paragraph).strip()
                if (
                    len(paragraph) > 12
                    and paragraph not in seen
                    and not paragraph.startswith(("This page is", "Title is"))
                ):
                    seen.add(paragraph)
                    paragraphs.append(paragraph)
            if sum(map(len, paragraphs)) > 100:
                found.append("\n".join(paragraphs))
                count += len(found[-1])
        print(f"{package}: {count / 1e6:.2f} million characters", flush=True)
    return found


def is_held_back(text):
    """Whether a document is for measuring: one in 25, whatever the order of the files."""
    return hashlib.sha256(text[:200].encode()).digest()[0] < 10


def train_tokenizer(texts, folder, vocab_size):
    """Write tokenizer.model and the files beside it, and return the tokenizer."""
    from bpe import train_bpe
    from checkpoints import load_tokenizer

    lines = [line[:4000] for text in texts for line in text.split("\n")]
    lines = random.Random(0).sample(lines, min(len(lines), 60_000))
    (folder / "tokenizer.model").write_bytes(train_bpe(lines, vocab_size, character_coverage=0.998))
    (folder / "tokenizer_config.json").write_text((ROOT / "tokenizer_config.json").read_text())
    (folder / "config.json").write_text((ROOT / "config.json").read_text())
    return load_tokenizer(folder)


# ---- training -------------------------------------------------------------------------------------------------------


def prepare(folder, vocab_size):
    """Write the two texts, the tokenizer and `ids.pt`, the examples to train on: int32 [N, LENGTH]."""
    texts = documents(folder / "packages")
    held_back = [text for text in texts if is_held_back(text)]
    texts = [text for text in texts if not is_held_back(text)]
    random.Random(0).shuffle(texts)
    (folder / "held_back.txt").write_text("\n\n".join(held_back), encoding="utf-8")
    (folder / "train.txt").write_text("\n\n".join(texts), encoding="utf-8")
    tokenizer = train_tokenizer(texts, folder, vocab_size)
    ids = [i for text in texts for i in [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]]
    torch.save(torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH).int(), folder / "ids.pt")
    print(f"{len(held_back)} documents held back; {len(ids) / 1e6:.2f} million tokens to train on", flush=True)


def run(args):
    from chatglm2.configuration_chatglm import ChatGLMConfig
    from chatglm2.modeling_chatglm import ChatGLMForConditionalGeneration
    from checkpoints import load_tokenizer

    if not (args.folder / "ids.pt").exists():
        prepare(args.folder, args.vocab_size)
    tokenizer, ids = load_tokenizer(args.folder), torch.load(args.folder / "ids.pt").long()
    torch.manual_seed(args.seed)
    shape = {**SHAPE, "num_layers": args.layers, "padded_vocab_size": -len(tokenizer) % 64 + len(tokenizer)}
    model = ChatGLMForConditionalGeneration(ChatGLMConfig(**shape)).float().train()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters", flush=True)
    target = args.folder / str(args.seed)
    tokenizer.save_pretrained(target)
    train(model, ids, target, args)


def train(model, ids, target, args):
    """AdamW, with the learning rate on a cosine over --minutes; saved to `target` every five of them and at the end."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(args.seed)
    spent, step, order, mean, saved = 0.0, 0, [], None, 0.0
    while spent < args.minutes * 60:
        begin = time.process_time()  # the time of this process: it may be stopped in between
        if len(order) < BATCH:
            order = torch.randperm(len(ids), generator=generator).tolist()
        batch, order = ids[order[:BATCH]], order[BATCH:]
        progress = spent / (args.minutes * 60)
        rate = 3e-3 * min(1, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        spent += (time.process_time() - begin) / torch.get_num_threads()
        step += 1
        if step % 20 == 0:
            seen = step * BATCH * LENGTH / 1e6
            print(f"step {step}, {seen:.2f} million tokens, {spent / 60:.1f} min, loss {mean:.3f}", flush=True)
        if spent - saved > 300:
            model.save_pretrained(target)
            saved = spent
    model.save_pretrained(target)
