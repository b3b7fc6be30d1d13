"""README.md of an exported student: where it comes from, how good it is and what it is compared with, how to use it.

Only what a run left behind is told: its checkpoint, its configuration, its metrics, the comparison it belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from irgdistill.config import Config, dump, read_yaml, validate
from irgdistill.errors import UserError
from irgdistill.io import RunFolder, records
from irgdistill.models import Network, multiply_adds, parameters
from irgdistill.training import metric_name, score

CITATION = """```bibtex
@inproceedings{liu2019knowledge,
  title     = {Knowledge Distillation via Instance Relationship Graph},
  author    = {Liu, Yufan and Cao, Jiajiong and Li, Bing and Yuan, Chunfeng
               and Hu, Weiming and Li, Yangxi and Duan, Yunqiang},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  pages     = {7096--7104},
  year      = {2019}
}
```
"""


OUTSIDE = {
    "--teacher-checkpoint": ("teacher", "checkpoint"),
    "--teacher-cache": ("teacher", "cache"),
    "--student-checkpoint": ("student", "checkpoint"),
}
"""Files and folders that a run needs and an export does not hold: options and their keys."""


def write_card(
    folder: Path, network: Network, metadata: Mapping[str, Any], checkpoint: Path, license: str, repository: str | None
) -> None:
    """README.md, and recipe.yaml where the run's configuration is still beside the checkpoint."""
    run = RunFolder(checkpoint.parent)
    config = _config(run, metadata)
    if config is not None:
        (folder / "recipe.yaml").write_text(dump(config), encoding="utf-8")
    about = _front_matter(network, metadata, license)
    (folder / "README.md").write_text(
        f"---\n{about}\n---\n\n{card_text(network, metadata, run, config, repository or 'USER/NAME', license)}",
        encoding="utf-8",
    )


def card_text(
    network: Network, metadata: Mapping[str, Any], run: RunFolder, config: Config | None, repository: str, license: str
) -> str:
    """The card below its front matter, as Markdown."""
    teacher = metadata["teacher"]
    taught = "trained on labels alone" if teacher is None else f"distilled from `{public_name(teacher['name'])}`"
    sections = {
        f"{network.architecture}, {taught}": _summary(network, metadata),
        "Use": _use(network, repository),
        "Accuracy": _accuracy(metadata, run),
        "Controls": _controls(metadata, run),
        "Recipe": _recipe(metadata, config),
        "Matched stages": _plan(metadata["plan"]),
        "Versions and licence": ", ".join(f"{name} {version}" for name, version in metadata["versions"].items())
        + f"\n\nLicence of the weights: {license}. The teacher and the data may have terms of their own.\n",
        "Source": CITATION,
    }
    kept = [(title, text) for title, text in sections.items() if text]
    return "\n".join(f"{'##' if i else '#'} {title}\n\n{text}" for i, (title, text) in enumerate(kept))


def data_name(metadata: Mapping[str, Any]) -> str:
    """The data set's own name: of a folder its last part, no path of the machine it was on."""
    return Path(source).name if Path(source := str(metadata["data"]["source"])).is_absolute() else source


def public_name(network: str | None) -> str | None:
    """A network's name, of a `local-dir:` without the path to it."""
    kind, colon, path = (network or "").partition("local-dir:")
    return f"local-dir:{Path(path).name}" if colon and not kind else network


def _front_matter(network: Network, metadata: Mapping[str, Any], license: str) -> str:
    name, metrics = data_name(metadata), metadata["metrics"]
    folder = Path(str(metadata["data"]["source"])).is_absolute()
    results = None
    if "top1" in metrics:
        results = EvalResult(
            task_type="image-classification",
            dataset_type="imagefolder" if folder else name,
            dataset_name=name,
            dataset_split="validation",
            metric_type="accuracy",
            metric_name="top-1 accuracy",
            metric_value=round(metrics["top1"] / 100, 6),
        )
    data = ModelCardData(
        library_name="timm",
        license=license,
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "irgdistill", "knowledge-distillation"],
        metrics=["accuracy"],
        model_name=network.architecture,
        eval_results=None if results is None else [results],
    )
    text: str = data.to_yaml()
    return text.rstrip()


def _config(run: RunFolder, metadata: Mapping[str, Any]) -> Config | None:
    """The run's configuration without paths of its machine; None where it is not beside the checkpoint."""
    if not run.config.exists():
        return None
    try:
        config = validate(read_yaml(run.config))
    except UserError:
        return None
    if (config.method, config.seed) != (metadata["method"], metadata["seed"]):
        return None  # of another run
    changed: dict[str, Any] = {
        "data.source": data_name(metadata),
        "data.root": Path("data"),
        "teacher.name": public_name(config.teacher.name),
        "student.name": public_name(config.student.name),
    }
    for part, key in OUTSIDE.values():
        if (path := getattr(getattr(config, part), key)) is not None:
            changed[f"{part}.{key}"] = Path(path.name)
    return config.replaced(changed)


# --- sections ---------------------------------------------------------------------------------------------------------


def _summary(network: Network, metadata: Mapping[str, Any]) -> str:
    size = "×".join(map(str, network.input.size))
    return (
        f"An image classifier for {network.num_classes} classes of `{data_name(metadata)}`, trained with irgdistill "
        f"(method `{metadata['method']}`): {parameters(network.model):,} parameters, "
        f"{multiply_adds(network):,} multiply-adds at {size} pixels.\n"
    )


def _use(network: Network, repository: str) -> str:
    lines = [
        "import timm",
        "from PIL import Image",
        "",
        f'model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()  # or "local-dir:FOLDER"',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        'logits = model(transform(Image.open("image.png").convert("RGB")).unsqueeze(0))',
        'print(model.pretrained_cfg["label_names"][logits.argmax()])',
        "",
    ]
    note = ""
    if type(network.model).__module__.startswith("irgdistill."):
        note = (
            f"timm alone does not know `{network.architecture}`: with irgdistill installed, the first line registers "
            "it.\n\n"
        )
        lines.insert(0, "import irgdistill.models")
    return note + "```python\n" + "\n".join(lines) + "```\n"


def _accuracy(metadata: Mapping[str, Any], run: RunFolder) -> str:
    metrics = metadata["metrics"]
    if not metrics:
        return ""
    student = f"this student, after epoch {metrics['epoch']}"
    if "top1" not in metrics:  # validated without labels
        rows = [["network", "agreement with the teacher %", "validation images"]]
        rows.append([student, f"{metrics['agreement']:.2f}", f"{metrics['images']:,}"])
        return _table(rows) + "\n" + _chosen(metrics, run)
    rows = [["network", "top-1 %", "top-5 %", "validation images"]]
    rows.append([student, f"{metrics['top1']:.2f}", f"{metrics['top5']:.2f}", f"{metrics['images']:,}"])
    comparison, teacher = _comparison(metadata, run), metadata["teacher"]
    tried = _tried_teacher(run)
    if teacher is not None and comparison is not None and comparison["teacher_top1"] is not None:
        count = f"{comparison['validation_images']:,}"
        rows.append([f"teacher, `{public_name(teacher['name'])}`", f"{comparison['teacher_top1']:.2f}", "–", count])
    elif teacher is not None and tried is not None:
        rows.append([f"teacher, `{public_name(teacher['name'])}`", f"{tried['top1']:.2f}", "–", f"{tried['images']:,}"])
    return _table(rows) + "\n" + _chosen(metrics, run)


def _chosen(metrics: Mapping[str, Any], run: RunFolder) -> str:
    """Whether these images also chose the epoch."""
    if not run.summary.exists():
        return "The run was not finished; these are the numbers of its last evaluation.\n" if run.state.exists() else ""
    summary = json.loads(run.summary.read_text(encoding="utf-8"))
    if metrics["epoch"] == summary["epochs"]:
        return f"These are the weights after the last of {summary['epochs']} epochs.\n"
    last = score({metric_name(metrics): summary[f"last_{metric_name(metrics)}"]})
    return f"The best of {summary['epochs']} epochs, chosen on these same images; after the last epoch {last} %.\n"


def _tried_teacher(run: RunFolder) -> dict[str, Any] | None:
    """What the run found of its teacher before training."""
    return next((record for record in records(run.metrics) if record["kind"] == "teacher"), None)


def _comparison(metadata: Mapping[str, Any], run: RunFolder) -> dict[str, Any] | None:
    """compare.json of the comparison that this run is part of."""
    folder = run.path.resolve()
    path = folder.parent.parent / "compare.json"
    if (folder.parent.name, folder.name) != (metadata["method"], str(metadata["seed"])) or not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    inside = any(row["method"] == metadata["method"] and metadata["seed"] in row["seeds"] for row in result["rows"])
    return result if inside else None


def _controls(metadata: Mapping[str, Any], run: RunFolder) -> str:
    """The comparison's own table."""
    if _comparison(metadata, run) is None:
        return ""
    told = (run.path.resolve().parent.parent / "compare.md").read_text(encoding="utf-8")
    return f"The same student by other methods; this one is `{metadata['method']}`, seed {metadata['seed']}.\n\n{told}"


def _weighed(name: str, term: Mapping[str, Any]) -> str:
    fade = term.get("fade")
    gone = "" if fade is None else f" (to {fade[0]:.0%} of the training, gone from {fade[1]:.0%} on)"
    return f"{term['weight']:g} · {name}{gone}"


def _recipe(metadata: Mapping[str, Any], config: Config | None) -> str:
    terms = [_weighed(name, term) for name, term in metadata["losses"].items() if term["weight"]]
    rows = [
        ["setting", "value"],
        ["method", f"`{metadata['method']}`"],
        ["loss", " + ".join(terms)],
        ["data", f"`{data_name(metadata)}`, batches of {metadata['data']['batch_size']}"],
        ["seed", str(metadata["seed"])],
    ]
    if config is None:
        return _table(rows)
    optim, schedule = config.optim, config.schedule
    decay, warm = f"weight decay {optim.weight_decay:g}", f"warm-up epochs: {schedule.warmup_epochs:g}"
    changed = config.augment.model_dump(exclude_defaults=True)
    rows += [
        ["epochs", str(schedule.epochs)],
        ["optimizer", f"{optim.name}, learning rate {optim.lr:g}, momentum {optim.momentum:g}, {decay}"],
        ["schedule", f"{schedule.name}, {warm}"],
        ["augmentation", ", ".join(f"{name} {value}" for name, value in changed.items()) or "the default"],
    ]
    options = ""
    if Path(str(metadata["data"]["source"])).is_absolute():
        options += " --data FOLDER"
    for option, (part, key) in OUTSIDE.items():
        if (path := getattr(getattr(config, part), key)) is not None:
            options += f" {option} {path}"
    return f"{_table(rows)}\nAgain: `irgdistill distill --preset recipe.yaml{options}`\n"


def _plan(plan: Mapping[str, Any] | None) -> str:
    if plan is None:
        return ""
    rows = [["stage", "teacher's last block", "student's last block", "widths"]]
    for pair in plan["pairs"]:
        taps = [pair[role]["exit"] for role in ("teacher", "student")]
        cells = [f"`{tap['module']}`" for tap in taps]
        rows.append([pair["name"], *cells, " / ".join(str(tap["channels"]) for tap in taps)])
    return _table(rows) + "".join(f"\n- {note}" for note in plan["notes"]) + "\n" * bool(plan["notes"])


def _table(rows: Sequence[Sequence[str]]) -> str:
    first, *others = ["| " + " | ".join(row) + " |\n" for row in rows]
    return first + "|" + "---|" * len(rows[0]) + "\n" + "".join(others)
