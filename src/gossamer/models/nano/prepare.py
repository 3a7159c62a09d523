"""Prepare nano's training: installed packages become one file of tokens and a tokenizer."""

import argparse
import json

if __package__:
    from gossamer.models.nano import corpus, tokenizer
else:  # run as a plain file, where this folder is on the path and gossamer may not be
    import corpus  # pyright: ignore[reportMissingImports]
    import tokenizer  # pyright: ignore[reportMissingImports]


def prepare(options: argparse.Namespace, context: int) -> None:
    """Collect, tokenise, and write the corpus file and the packaged texts.

    Parameters
    ----------
    options : of the command line's ``prepare``. context : longest input the tokenizer names.
    """
    packages = corpus.collect(options.packages_dir, options.package_bytes)
    train = [one for one in packages if one.name not in corpus.HELDOUT]
    heldout = [one for one in packages if one.name in corpus.HELDOUT]
    if not train or not heldout:
        raise ValueError(
            f"found {len(train)} training and {len(heldout)} held-out packages; both splits need "
            f"some: install some of {corpus.HELDOUT} in a folder named by --packages-dir"
        )
    documents = sorted(file for one in train for file in one.files)
    documents.sort(key=lambda file: corpus.order(file[0]))
    sample, size = [], 0
    for _, text in documents:
        if size < options.tokenizer_bytes:
            sample.append(text)
            size += len(text)
    bpe = tokenizer.build(sample, options.vocabulary)
    arrays, tokens = corpus.tokenise(packages, bpe)
    meta = {
        "vocabulary": bpe.get_vocab_size(),
        "tokens": {split: len(array) for split, array in arrays.items()},
        "packages": [
            {
                "name": one.name,
                "version": one.version,
                "licence": one.licence,
                "split": "held out" if one.name in corpus.HELDOUT else "train",
                "files": len(one.files),
                "bytes": sum(len(text.encode()) for _, text in one.files),
                "tokens": tokens[one.name],
            }
            for one in packages
        ],
    }
    members = tokenizer.files(bpe, context)
    corpus.save(options.corpus, arrays, {**members, "meta.json": json.dumps(meta).encode()})
    if options.texts:
        shipped = [one for one in train if one.name in corpus.CALIBRATION]
        used = {}
        for name, source in {"calibration": shipped, "heldout": heldout}.items():
            data, used[name] = corpus.excerpt(source, options.text_bytes)
            corpus.write_atomic(options.texts / f"{name}.txt.gz", data)
        corpus.write_atomic(options.texts / "LICENSES.txt", corpus.licences(used))
    print(f"{len(train)} training packages, {meta['tokens']['train']:,} tokens")
    print(f"{len(heldout)} held-out packages, {meta['tokens']['val']:,} tokens")
    print(f"{options.corpus.name}: {options.corpus.stat().st_size / 1e6:.1f} MB")
