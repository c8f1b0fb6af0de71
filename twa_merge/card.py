"""The model card of a merge, and what of a run may be shown to others: no paths, no names of local folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from twa_merge.mixing import MixingWeights
from twa_merge.recipe import Recipe, to_yaml

if TYPE_CHECKING:
    from twa_merge.checkpoints import Soup

_PIPELINES = {
    "text-classification": "text-classification",
    "image-classification": "image-classification",
    "causal-lm": "text-generation",
    "seq2seq": "translation",
}
_PRIVATE = "local-data"


def public_names(checkpoints: Sequence[str], revisions: Sequence[str]) -> tuple[str, ...]:
    """Return checkpoints as others may know them: `org/name@commit`, or `checkpoint-k` for what is not on the Hub.

    Args:
        checkpoints: labels, as the user named them.
        revisions: the commit of each; empty for a local one.
    """
    if not revisions:
        revisions = [""] * len(checkpoints)
    return tuple(
        f"{label.partition('@')[0]}@{revision}" if revision else f"checkpoint-{k + 1}"
        for k, (label, revision) in enumerate(zip(checkpoints, revisions, strict=True))
    )


def is_on_hub(path: str | None) -> bool:
    """Whether data are named as the Hub does, and nothing of that name is here."""
    return path is not None and path.count("/") == 1 and not Path(path).expanduser().exists()


def public_recipe(recipe: Recipe, names: Sequence[str], *, data_on_hub: bool) -> Recipe:
    """Return a recipe without paths: with these names of the checkpoints, and local data and output named as such."""
    data = recipe.data
    if data.path is not None and not data_on_hub:
        data = replace(data, path=_PRIVATE)
    output = replace(recipe.output, path="merged" if recipe.output.path is not None else None)
    return replace(recipe, checkpoints=list(names), data=data, output=output)


def model_card(
    weights: MixingWeights,
    soup: Soup,
    *,
    task: str | None = None,
    league: str = "",
    recipe: Recipe | None = None,
) -> str:
    """Return the merged model's README.md, with the front matter that the Hub reads.

    Args:
        weights: the merge.
        soup: its checkpoints.
        task: its name, where known.
        league: the table of all candidates, how to read it, and the verdict.
        recipe: that makes the merge again.
    """
    names = public_names(soup.labels, soup.revisions)
    rows = f"{len(weights.groups)} groups of parameters" if len(weights.groups) > 1 else "all parameters"
    body = [
        "# Merged model",
        "",
        f"A merge of {len(names)} checkpoints of one architecture by `twa-merge`, with mixing weights for {rows} "
        "(`mixing_weights.json`)"
        + (": trainable weight averaging, [arXiv 2205.13104](https://arxiv.org/abs/2205.13104)." if league else "."),
        "",
        *([league, ""] if league else []),
        "## Members",
        "",
        *(f"- {name}" for name in names),
        "",
        "## The same again",
        "",
        "```bash",
        f"twa-merge apply mixing_weights.safetensors {' '.join(names)} --output merged",
        "```",
    ]
    if recipe is not None:
        public = public_recipe(recipe, names, data_on_hub=is_on_hub(recipe.data.path))
        body += ["", "learned by `twa-merge run recipe.yaml` with", "", "```yaml", to_yaml(public).strip(), "```"]
    return f"---\n{_front_matter(soup, names, task)}\n---\n\n" + "\n".join(body) + "\n"


def _front_matter(soup: Soup, names: Sequence[str], task: str | None) -> str:
    """Return what the Hub reads of a card, as YAML."""
    from huggingface_hub import ModelCardData

    parents = list(dict.fromkeys(name.partition("@")[0] for name, r in zip(names, soup.revisions, strict=True) if r))
    data = ModelCardData(
        base_model=parents or None,
        base_model_relation="merge" if parents else None,
        library_name="transformers" if soup.folder is not None else None,
        pipeline_tag=_PIPELINES.get(task or ""),
        tags=["merge", "model-soup", "twa-merge"],
    )
    return str(data.to_yaml())
