"""A model in use, held against the dense one again on data that neither has been judged on before."""

import torch

from cluster.errors import InputError
from cluster.storage import open_store
from workflows.data.labelled import labelled_windows
from workflows.data.windows import Windows, build_windows, check_known
from workflows.evaluation.gates import Verdict, judge
from workflows.evaluation.quality import Quality, measure_quality
from workflows.models.labels import labels_of
from workflows.models.source import Source, load_tokenizer
from workflows.models.state import ModelState
from workflows.models.whole import load_model
from workflows.recipe import DataSource, Recipe
from workflows.stages import serving_dtype


def judge_live(dense: Source, live: Source, data: DataSource, recipe: Recipe) -> Verdict:
    """Judges a released model by its recipe's gates, on other data.

    Both models go through here one after the other, whole, in this process.

    Args:
        dense: the model that was compressed; its tokenizer cuts the windows for both.
        live: the release, as a stock directory.
        data: fresh text.
        recipe: gives gates, device, threads and seed.

    Raises:
        InputError: the data cannot be read or are too little.
    """
    tokenizer = load_tokenizer(dense)
    if recipe.classifies != (data.label is not None):
        raise InputError(
            f"data.label: {data.source}: the release is judged on texts "
            + ("with labels; name their column" if recipe.classifies else "without labels; leave it out")
        )
    if recipe.classifies:
        windows = labelled_windows("fresh", data, tokenizer, labels_of(dense.config), recipe.seed)
    else:
        windows = build_windows("fresh", data, tokenizer, recipe.seed)
    check_known({"fresh": windows}, dense.config["vocab_size"], tokenizer)
    before, after = (_quality(one, windows, recipe) for one in (dense, live))
    return judge(before, after, recipe.gates, recipe.seed)


def _quality(source: Source, windows: Windows, recipe: Recipe) -> Quality:
    state = ModelState(
        source=source.uri, source_digest=source.digest, config=source.config, store=open_store(source.uri).uri
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        return measure_quality(load_model(state, getattr(torch, serving_dtype(state))).to(recipe.device), windows)
    finally:
        torch.set_num_threads(threads)
