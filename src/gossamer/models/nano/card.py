"""Write the model card from the record of the run, so that its numbers cannot drift."""

from collections import Counter

_TEMPLATE = """\
---
language: code
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [python, llama, sparsity]
---

# nano

A Llama-style causal language model of Python source with {parameters:,} parameters. It ships
inside gossamer so that every sparsity method can be tried, tested and measured on a real trained
transformer, on any machine, without a network.

**Limits.** It is a measuring instrument: large enough to have structure worth pruning, small
enough to load in a second. It writes text that looks like Python and is seldom correct. It knows
no facts, follows no instructions, and is not for use as an assistant or a code generator. What a
method does to it is evidence about mechanisms, not a forecast for models a thousand times larger.
Like any language model it can reproduce passages of its training files.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer.models import nano

model = AutoModelForCausalLM.from_pretrained(nano.path())
tokenizer = AutoTokenizer.from_pretrained(nano.path())
```

`nano.calibration_documents()` returns files of training packages, `nano.heldout_documents()`
files of packages the model never saw.

## Quality

On the {val_packages} held-out packages, of which no file was trained on
({heldout[tokens]:,} tokens, {heldout[bytes]:,} bytes), after the cast to bf16, in windows of
{context} tokens that do not overlap:

| predictor | perplexity per token |
| --- | ---: |
| **nano** | **{heldout[perplexity]:.3f}** |
| bigram counts (Witten-Bell, backing off to unigram) | {baselines[bigram]:.1f} |
| unigram counts (add one) | {baselines[unigram]:.1f} |

nano needs {heldout[bits_per_byte]:.4f} bits per byte. The baselines count the same training
tokens and are scored on the same targets.

## Architecture

| | |
| --- | ---: |
{architecture}

RMSNorm, SwiGLU, rotary positions (theta 10000), grouped-query attention, tied embedding and head,
no biases. Every dimension is a multiple of 16. Weights are bf16 safetensors.

The tokenizer is byte-level BPE with {vocabulary} tokens: any text has an exact code. Every digit is
its own token. `<|endoftext|>` (id 0) separated training documents and is both bos and eos;
`<|pad|>` (id 1) pads on the left. The tokenizer adds neither by itself.

## Training

| | |
| --- | --- |
{training}

AdamW (betas 0.9 and 0.95, weight decay 0.1 on matrices), gradients clipped to norm 1, bf16
autocast over fp32 masters; the learning rate rises linearly, stays level, and falls linearly to
zero. The full record is `training.json`. To train it again, with any site-packages folders:

```sh
python -m gossamer.models.nano.train prepare --corpus nano.zip --packages-dir SITE_PACKAGES
python -m gossamer.models.nano.train train --corpus nano.zip --out nano --time-limit 480
```

## Data

Python files of {packages} installed distributions: {train_packages} for training ({train_tokens:,}
tokens), {val_packages} held out whole. A distribution is used only if its own metadata
states a permissive licence ({families}); an unclear statement
counts as a refusal, so copyleft packages are absent. Dropped are files under another licence,
generated, minified, huge or mostly numeric files, vendored copies, exact duplicates, training
files of which a third of the long lines also stand in held-out files, and what exceeds
16 MB of one package.

{data}

## Samples

{samples}
"""


def render(record: dict) -> str:
    """Format a training record as the model folder's README.

    Parameters
    ----------
    record : contents of ``training.json``.
    """
    shape, meta = record["shape"], record["corpus"]
    train = [one for one in meta["packages"] if one["split"] == "train"]
    architecture = {
        "hidden size": shape["hidden_size"],
        "layers": shape["num_hidden_layers"],
        "MLP width": shape["intermediate_size"],
        "query heads": shape["num_attention_heads"],
        "key/value heads": shape["num_key_value_heads"],
        "head dimension": shape["head_dim"],
        "vocabulary": shape["vocab_size"],
        "context": shape["max_position_embeddings"],
        "parameters": f"{record['parameters']:,}",
    }
    training = {
        "command": f"`{record['command']}`",
        "seed": record["seed"],
        "device": record["device"],
        "steps": f"{record['steps']:,}",
        "tokens seen": f"{record['tokens_seen']:,} ({record['epochs']} epochs)",
        "seconds": record["seconds"],
        "peak learning rate": record["schedule"]["peak_lr"],
        "torch": record["torch"],
    }
    families = Counter(_family(one["licence"]) for one in meta["packages"])
    return _TEMPLATE.format(
        parameters=record["parameters"],
        heldout=record["heldout"],
        baselines=record["baselines"],
        context=shape["max_position_embeddings"],
        vocabulary=shape["vocab_size"],
        packages=len(meta["packages"]),
        train_packages=len(train),
        val_packages=len(meta["packages"]) - len(train),
        train_tokens=meta["tokens"]["train"],
        architecture=_rows(architecture),
        training=_rows(training),
        families=", ".join(name for name, _ in families.most_common()),
        data=_data(meta["packages"]),
        samples=_samples(record["samples"]),
    )


def _family(licence: str) -> str:
    """First licence of an expression, versions and clauses dropped."""
    name = licence.split(" ")[0]
    return "BSD" if name.startswith("BSD") else name


def _rows(table: dict) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in table.items())


def _data(packages: list[dict]) -> str:
    rows = [
        "| package | version | licence | split | files | tokens |",
        "| --- | --- | --- | --- | ---: | ---: |",
    ]
    rows += [
        f"| {one['name']} | {one['version']} | {one['licence']} | {one['split']} "
        f"| {one['files']:,} | {one['tokens']:,} |"
        for one in packages
    ]
    return "\n".join(rows)


def _samples(samples: list[dict]) -> str:
    parts = ["Unedited, the prompt included; the continuation stops after 120 tokens."]
    for one in samples:
        how = f"temperature {one['temperature']}" if one["temperature"] else "greedy"
        text = "\n".join(line.rstrip() for line in one["text"].rstrip().split("\n"))
        parts.append(f"{how[0].upper()}{how[1:]}:\n\n````python\n{text}\n````")
    return "\n\n".join(parts)
