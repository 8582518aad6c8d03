"""Repositories of the Hugging Face Hub: weights, description, and model card of an export."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_graft.analysis.exported import verified_content
from dist_graft.analysis.exporting import training_options, weights_file
from dist_graft.analysis.run_files import read_run
from dist_graft.config.train import is_named_weights
from dist_graft.errors import ConfigError
from dist_graft.monitoring.console import final_results
from dist_graft.printing import format_metric, markdown_table
from dist_graft.references import is_reference
from dist_graft.run_directory import RunDirectory
from dist_graft.training.weights import (
    EXPORT_DESCRIPTION,
    is_network_file,
    read_description,
    read_weights,
)

_EXPORTED = (".safetensors", ".pt")
_NO_CONTROL = "No control was trained: these numbers do not show whether the exchange helped."
_ABOUT_CONTROL = (
    "The control has the same data, model, optimizer and epochs, but no rounds. The results are "
    "those of one run each, without a statistical test."
)


def repository_files(folder: Path, repo: str, *, control: Path | None = None) -> dict[str, bytes]:
    """Content of a repository's files by name; weights in the format pt become safetensors.

    Raises: RunDirectoryError if the export or the control is damaged; ConfigError if the folder
        holds no export, or one of programs instead of weights, or the control does not match it.
    """
    if not (folder / EXPORT_DESCRIPTION).is_file():
        raise ConfigError(
            f"{folder} is not an exported folder: run dist-graft export, and pass its folder"
        )
    description = read_description(folder)
    control_summary = _control_summary(control, description, folder) if control else None
    names = sorted(description["sha256"])
    chosen = {Path(name).stem: name for name in names if name.endswith(_EXPORTED)}
    if not chosen:
        raise ConfigError(
            f"{folder} does not hold weights: export the run with --format safetensors"
        )
    files = {}
    for stem, name in chosen.items():  # of two formats, safetensors
        content = verified_content(folder / name, description)
        if name.endswith(".pt"):
            content = weights_file(read_weights(folder / name), "safetensors")
        files[f"{stem}.safetensors"] = content
    if training := description.get("training"):
        description["training"] = _without_folders(training)
    description |= {
        "run_dir": Path(description.get("run_dir", "")).name,  # no paths of this machine
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    for results in (description.get("results") or {}).values():
        results.pop("run_dir", None)
        results.pop("events", None)  # they name machines
    files[EXPORT_DESCRIPTION] = (json.dumps(description, indent=1) + "\n").encode()
    files["README.md"] = model_card(description, repo, control=control_summary).encode()
    return files


def _without_folders(training: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the training with the names of files of weights, without their folders."""
    shown = dict(training)
    start = shown.get("init_from")
    if start and not is_named_weights(start):
        shown["init_from"] = Path(start).name
    if distill := shown.get("distill"):
        names = [Path(teacher).name for teacher in distill["teachers"]]
        shown["distill"] = {**distill, "teachers": names}
    return shown


def _control_summary(path: Path, description: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Content of summary.json of the control: a run like the exported one, but without exchange.

    Raises: ConfigError if it exchanged weights, has not finished, or differs in other ways.
    """
    run = read_run(path)
    expected = description.get("training")
    if not expected or not (description.get("results") or {}).get("summary"):
        raise ConfigError(
            f"{folder} has no results to compare with --control: export the finished run again"
        )
    if not run.summary:
        raise ConfigError(f"--control {path} has no summary.json: let this run finish")
    if any(network.last_round for network in run.networks):
        raise ConfigError(f"--control {path} exchanged weights: train it with --method none")
    found = training_options(run.config, RunDirectory(path).read_custom())
    for source, own in ((f"--control {path}", found["own"]), (folder, expected.get("own"))):
        if own:
            raise ConfigError(
                f"{source} was trained in Python with its own {', '.join(own)}, which cannot be "
                "compared"
            )
    for section in (*expected, *(name for name in found if name not in expected)):
        values, others = expected.get(section), found.get(section)
        if others != values:
            there, here = (
                _differences(section, *pair) for pair in ((others, values), (values, others))
            )
            raise ConfigError(
                f"--control {path} has {there}, but {folder} has {here}: only the exchange may "
                "differ"
            )
    return run.summary


def _differences(section: str, values: Any, others: Any) -> str:
    """The options of a section that differ, with their values."""
    if not isinstance(values, dict) or not isinstance(others, dict):
        return f"{section} {values}"
    return (
        ", ".join(
            f"{section}.{name} {value}"
            for name, value in values.items()
            if name not in others or others[name] != value
        )
        or f"no such options in {section}"
    )


def upload(files: Mapping[str, bytes], repo: str, *, private: bool) -> str:
    """Create the repository unless it exists, and upload the files in one commit.

    Returns: the address of the repository.
    Raises: ConfigError if huggingface_hub is missing, or the Hub refuses or cannot be reached.
    """
    try:
        import huggingface_hub
        from huggingface_hub import CommitOperationAdd
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"dist-graft push needs the package {error.name}: pip install 'dist_graft[hub]'"
        ) from error
    api = huggingface_hub.HfApi()
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in files.items()
    ]
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        is_public = private and not api.repo_info(repo).private  # it may have existed before
        if not is_public:
            message = f"Upload {len(files)} files of dist_graft"
            api.create_commit(repo, operations, commit_message=message)
    except Exception as error:  # of the HTTP library, which depends on the version
        cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"{repo} cannot be uploaded ({cause}): check the network, the name, and that you are "
            "logged in (hf auth login, or HF_TOKEN); --out FOLDER writes the files instead"
        ) from error
    if is_public:
        raise ConfigError(
            f"{url} exists and is public, so nothing was uploaded: make it private on the Hub, "
            "choose another --repo, or leave out --private"
        )
    return f"uploaded {len(files)} files: {url}"


def model_card(
    description: Mapping[str, Any], repo: str, *, control: Mapping[str, Any] | None = None
) -> str:
    """README.md of the repository: what was trained, its results, and how to load it.

    Args:
        description: content of export.json.
        repo: name of the repository.
        control: content of summary.json of the control, a run without exchange.
    """
    networks = [name for name in description["sha256"] if is_network_file(name)]
    name = description["model"] or "a model built in Python"
    of_timm = name.startswith("timm/")
    classification = bool(description.get("classes"))
    graft = description.get("method") or {}
    options = graft.get("graft") or {}
    method = str(graft.get("name", "unknown"))
    if method == "graft":
        method += (
            f" (amplitude {options.get('amplitude')}, sensitivity {options.get('sensitivity')})"
        )
    data = description.get("data", "unknown data")
    if "data" in (description.get("training") or {}).get("own", ()):
        data = "custom data"
    lines = [
        *("---", "library_name: dist_graft"),
        *(["pipeline_tag: image-classification"] if classification else []),
        *("tags:", *(["- image-classification"] if classification else [])),
        *("- dist_graft", "---", ""),
        f"# {repo.rpartition('/')[2]}",
        "",
        f"{len(networks)} x {name}, trained side by side on {data} for {description['epoch']} "
        f"epochs; method: {method}, {description['round']} rounds. The networks differ, and each "
        "can be used alone.",
        "",
        "## Results",
        "",
        *_results(description, control),
        "",
        "## Use",
        "",
        f"Needs dist_graft with its {'extras hub and timm' if of_timm else 'extra hub'}:",
        "",
        "```python",
        "from huggingface_hub import snapshot_download",
        "",
        "import dist_graft",
        "",
        *_use(description, repo),
        "",
        "Without dist_graft: `model.load_state_dict(safetensors.torch.load_file(path))`. "
        f"`export.json` has {'the class names, the preprocessing, and ' if classification else ''}"
        "the sha256 of each file.",
        "",
        "## Versions",
        "",
        ", ".join(f"{what} {version}" for what, version in description["versions"].items()),
        "",
    ]
    return "\n".join(lines)


def _use(description: Mapping[str, Any], repo: str) -> list[str]:
    """Python code that loads and calls a network, to the end of its block, and what it needs."""
    name, more = description["model"], ""
    notes: list[str] = []
    if name is None:
        more = ", model=make_model()"
        notes.append(
            "`make_model()` must return an `nn.Module` of the trained architecture; `load` copies "
            "the weights into it. Its code is not in this repository."
        )
    elif is_reference(name):
        more = ", trust_code=True"
        notes.append(f"`trust_code=True` lets `load` import and call `{name}`, which you need.")
    if description.get("preprocessing"):
        call = 'logits = model(model.preprocess("image.jpg")[None])'
    else:
        call = "outputs = model(inputs)"
        notes.append(
            "Prepare the batch `inputs` as in training: the run recorded no preprocessing."
        )
    code = [f'model = dist_graft.load(snapshot_download("{repo}"){more})', call, "```"]
    return [*code, "", " ".join(notes)] if notes else code


def _results(description: Mapping[str, Any], control: Mapping[str, Any] | None) -> list[str]:
    """Table of the population and its control, as Markdown."""
    results = description.get("results") or {}
    summary, evaluation = results.get("summary"), results.get("evaluation")
    if not summary:
        metrics = description.get("metrics") or {}
        keys = dict.fromkeys(key for values in metrics.values() for key in values)
        names = [key.removeprefix("test_") for key in keys if key.startswith("test_")]
        names.sort(key=lambda name: name == "loss")  # last
        rows = [
            (file, *(format_metric(values.get(f"test_{name}"), name) for name in names))
            for file, values in metrics.items()
        ]
        header = ("network", *(f"test {name}{_unit(name)}" for name in names))
        return [markdown_table(header, rows) if names else "none", "", _NO_CONTROL]
    metric = summary.get("metric", "accuracy")

    def cell(value: Any) -> str:
        return format_metric(value, metric)

    rows = final_results(summary, cell)
    if control:
        networks = len(control["networks"])
        title = f"control without exchange ({networks} network{'s' if networks > 1 else ''})"
        rows += [
            (f"{title}: {name}", *values)
            for name, *values in final_results(control, cell)[networks:]
        ]
    unit = _unit(metric)
    header = ("", f"test {metric} before the last round{unit}", f"after it{unit}")
    text = [markdown_table(header, rows), "", _ABOUT_CONTROL if control else _NO_CONTROL]
    if evaluation:
        soup = evaluation["uniform_soup"]
        as_is, reestimated = (
            format_metric(soup[f"batch_norm_{how}"], "accuracy") for how in ("as_is", "reestimated")
        )
        text += ["", f"Uniform soup: {as_is}%, with re-estimated batch norm {reestimated}%."]
    return text


def _unit(metric: str) -> str:
    return " (%)" if metric == "accuracy" else ""
