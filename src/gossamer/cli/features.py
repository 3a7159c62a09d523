"""``gossamer features``: look at what a sparse dictionary found."""

import shlex
import sys
import webbrowser
from typing import Annotated, Any

from cyclopts import App, Parameter

from gossamer.cli.show import bar, console, print_json
from gossamer.core import GossamerError
from gossamer.models import as_tokens, load_model
from gossamer.models.store import require_new
from gossamer.report import features as seen
from gossamer.report.features.facts import choose, imported_facts, page_facts, parse_numbers

__all__ = ["app"]

app = App(name="features", help="Look at what a sparse dictionary found.")

Flag = Annotated[bool, Parameter(negative=())]


@app.command
def show(
    sae: str,
    *,
    model: str | None = None,
    data: str | None = None,
    out: str = "features.html",
    serve: Flag = False,
    port: int = 0,
    open: Flag = False,
    only: str | None = None,
    most: int = 1000,
    hook: str | None = None,
    explanations: str | None = None,
    samples: int = 64,
    length: int = 256,
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    json: Flag = False,
) -> None:
    """Build one page of a dictionary's features that opens offline, or serve it.

    Parameters
    ----------
    sae
        Folder of a dictionary (gossamer, SAELens, sparsify, dictionary_learning, Gemma Scope), of
        a model saved by gossamer sparsify with a dictionary method, or Neuronpedia's JSON.
    model
        nano (packaged), a folder, or a hub id; without it the one the dictionary names.
    data
        Text to look at: a text, JSONL or parquet file. Without it the packaged text.
    out
        The page.
    serve
        Serve all features on this machine's loopback instead of writing a page.
    port
        Of the server; 0 takes a free one.
    open
        Open the page in the browser.
    only
        Features of the page, such as 3,17,40-50.
    most
        Features of the page, of a dictionary that has more.
    hook
        Path of the module that the dictionary reads, where it does not say so itself.
    explanations
        JSON or JSONL file of explanations by feature.
    samples
        Windows of text.
    length
        Tokens per window.
    seed
        Draws the windows, and the examples of each interval.
    dtype
        float32, bfloat16 or float16; by default float32 on CPU, bfloat16 on GPU.
    device
        cpu or cuda.
    json
        Print what was made as JSON.
    """
    if seen.is_neuronpedia(sae):
        if serve:
            raise GossamerError("a file of features is shown as a page; leave --serve out")
        made = seen.read_neuronpedia(sae)
        if only is not None:
            wanted = set(parse_numbers(only))
            made = [feature for feature in made if feature.index in wanted]
        _page(made[:most], imported_facts(made, sae), out, open, json)
        return
    numbers = None if only is None else parse_numbers(only)
    book, named = _book(
        sae, model, data, hook, explanations, samples, length, seed, dtype, device, json
    )
    if serve:
        facts = page_facts(book, sae, **named, shown=None, command=_command())
        _serve(seen.Shelf(book, facts), port, open)
        return
    chosen = choose(book, most, numbers)
    with bar("describing features", quiet=json) as progress:
        made = []
        for feature in book.features(chosen):
            made.append(feature)
            progress(len(made), len(chosen), "features")
    facts = page_facts(book, sae, **named, shown=len(chosen), command=_command())
    _page(made, facts, out, open, json)


@app.command
def export(
    sae: str,
    *,
    out: str,
    model: str | None = None,
    data: str | None = None,
    model_id: str | None = None,
    source: str = "gossamer",
    layer: int = 0,
    only: str | None = None,
    hook: str | None = None,
    explanations: str | None = None,
    samples: int = 64,
    length: int = 256,
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    json: Flag = False,
) -> None:
    """Write a dictionary's features as Neuronpedia's JSON.

    Parameters
    ----------
    sae
        A dictionary, as for gossamer features show.
    out
        Folder to write batch-0.json ... to; it must be new or empty.
    model
        nano (packaged), a folder, or a hub id; without it the one the dictionary names.
    data
        Text to look at: a text, JSONL or parquet file. Without it the packaged text.
    model_id
        Neuronpedia's name of the model; without it that of --model.
    source
        Neuronpedia's name of the set that the dictionary belongs to.
    layer
        Block that the dictionary reads, for Neuronpedia's listing.
    only
        Features to write, such as 3,17,40-50; without it those that fire.
    hook
        Path of the module that the dictionary reads, where it does not say so itself.
    explanations
        JSON or JSONL file of explanations by feature.
    samples
        Windows of text.
    length
        Tokens per window.
    seed
        Draws the windows, and the examples of each interval.
    dtype
        float32, bfloat16 or float16; by default float32 on CPU, bfloat16 on GPU.
    device
        cpu or cuda.
    json
        Print what was written as JSON.
    """
    require_new(out)
    numbers = None if only is None else parse_numbers(only)
    book, named = _book(
        sae, model, data, hook, explanations, samples, length, seed, dtype, device, json
    )
    alive = book.firing.counts.nonzero()[:, 0].tolist()
    chosen = alive if numbers is None else choose(book, 1, numbers)
    facts = {
        "n_prompts_total": len(book.firing.tokens),
        "n_tokens_in_prompt": book.firing.tokens.length,
        "dataset": named["data"],
    }
    name = named["model"].rstrip("/").rpartition("/")[2] if model_id is None else model_id
    folder = seen.write_neuronpedia(
        book.features(chosen), out, model=name, source=source, layer=layer, facts=facts
    )
    if json:
        print_json({"folder": str(folder), "features": len(chosen)})
    else:
        console.print(
            f"{len(chosen):,} features written to {folder}", markup=False, highlight=False
        )


def _book(
    sae: str,
    model: str | None,
    data: str | None,
    hook: str | None,
    explanations: str | None,
    samples: int,
    length: int,
    seed: int,
    dtype: str | None,
    device: str,
    quiet: bool,
) -> tuple[seen.Book, dict[str, str]]:
    """The dictionary with its codes of a text, and the names of what made them."""
    opened = seen.open_dictionary(sae)
    told = {} if explanations is None else seen.read_explanations(explanations)
    name = model or opened.model
    if not name:
        raise GossamerError(f"{sae} does not say which model it is of; name it with --model")
    loaded = load_model(name, dtype=dtype, device=device, kind="any")
    if loaded.tokenizer is None:
        raise GossamerError(f"{name} holds no tokenizer, so no token can be shown; add its files")
    paths = seen.modules_read(loaded.model, opened.dictionary, hook)
    tokens = as_tokens(
        data,
        loaded.model,
        samples=samples,
        length=length,
        seed=seed,
        tokenizer=loaded.tokenizer,
    )
    made = opened.dictionary.to(next(loaded.model.parameters()).device)
    with bar(f"encoding {sae}", quiet=quiet) as progress:
        firing = seen.collect(loaded.model, made, paths, tokens, progress=progress)
    first, last = made.metadata.get("writes") or (0, made.d_out)
    unembedding = seen.Unembedding.of(loaded.model, last - first)
    vocabulary = seen.Vocabulary(loaded.tokenizer)
    book = seen.Book(made, firing, vocabulary, unembedding, explanations=told, seed=seed)
    text = "packaged text" if data is None else data
    return book, {"model": name, "hook": ", ".join(paths), "data": text}


def _command() -> str:
    return shlex.join(["gossamer", *sys.argv[1:]])


def _page(
    features: list[seen.Feature], facts: dict[str, Any], out: str, show: bool, quiet: bool
) -> None:
    page = seen.build_page(features, facts, out)
    size = page.stat().st_size
    if quiet:
        print_json({"page": str(page), "features": len(features), "bytes": size})
    else:
        line = f"page: {page} ({len(features):,} features, {size / 1e6:.1f} MB)"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if show:
        webbrowser.open(page.resolve().as_uri())


def _serve(shelf: seen.Shelf, port: int, show: bool) -> None:
    """Until interrupted."""
    listening = seen.server(shelf, port)
    address = f"http://127.0.0.1:{listening.server_port}/"
    try:
        console.print(f"features: {address} (Ctrl-C ends it)", markup=False, highlight=False)
        if show:
            webbrowser.open(address)
        listening.serve_forever()
    except KeyboardInterrupt:
        return
    finally:
        listening.server_close()
