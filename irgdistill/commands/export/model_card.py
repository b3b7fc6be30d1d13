"""Writes README.md of an exported student: where it comes from, how accurate it is, and how to use it.

Every statement comes from what the run left on disk: checkpoint, configuration, metrics, and the comparison that the
run belongs to.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from irgdistill.commands.export.records import Comparison, TeacherCheck
from irgdistill.config import SKIPPED, Config, DataConfig, TeacherConfig, dump, public_name, read_yaml, validate_saved
from irgdistill.errors import UserError
from irgdistill.io import RunFolder, Summary, code_span, markdown, markdown_table, records, visible
from irgdistill.models import CheckpointMetadata, Network, PlanRecord, TermRecord, multiply_adds, parameters
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


TEACHER_FILES = {"--teacher-checkpoint": "checkpoint", "--teacher-cache": "cache"}
"""Files of a teacher that a run needs and an export does not contain: option -> key."""


def _without_folders(teacher: TeacherConfig) -> TeacherConfig:
    """The settings of a teacher with files by their names alone."""
    paths = {key: getattr(teacher, key) for key in TEACHER_FILES.values()}
    files = {key: Path(path.name) for key, path in paths.items() if path is not None}
    return teacher.replaced({"name": public_name(teacher.name), **files})


@dataclass(frozen=True)
class Provenance:
    """An exported student and the run that trained it."""

    network: Network
    metadata: CheckpointMetadata
    checkpoint: Path

    def __post_init__(self) -> None:
        if not self.metadata.method or self.metadata.data is None:
            raise UserError(f"{self.checkpoint} does not record the run that trained it; give --format timm")

    @property
    def run(self) -> RunFolder:
        """The folder of the checkpoint, in which other files of the run may lie."""
        return RunFolder(self.checkpoint.parent)

    @cached_property
    def data(self) -> DataConfig:
        """Settings of the section `data`."""
        return validate_saved({"data": self.metadata.data}, f"{self.checkpoint}: ").data

    @property
    def data_name(self) -> str:
        """Name of the data set; of a folder its last part, without the path on this machine."""
        source = str(self.data.source)
        return Path(source).name if self.data_is_folder else source

    @property
    def data_is_folder(self) -> bool:
        return Path(str(self.data.source)).is_absolute()

    @cached_property
    def config(self) -> Config | None:
        """The run's configuration without paths of this machine; None if it is not beside the checkpoint."""
        if not self.run.config.exists():
            return None
        try:
            config = validate_saved(read_yaml(self.run.config))
        except UserError:
            return None
        if (config.method, config.seed) != (self.metadata.method, self.metadata.seed):
            return None  # of another run
        changed: dict[str, Any] = {
            "data.source": self.data_name,
            "data.root": Path("data"),
            "teacher": _without_folders(config.teacher),
            "teachers": tuple(map(_without_folders, config.teachers)),
            "student.name": public_name(config.student.name),
            "plugins": tuple(plugin.replaced({"path": Path(plugin.path.name)}) for plugin in config.plugins),
        }
        if config.student.checkpoint is not None:
            changed["student.checkpoint"] = Path(config.student.checkpoint.name)
        return config.replaced(changed)

    @cached_property
    def comparison(self) -> Comparison | None:
        """compare.json of the comparison that the run belongs to, if any."""
        folder, metadata = self.run.path.resolve(), self.metadata
        path = self.comparison_folder / "compare.json"
        if (folder.parent.name, folder.name) != (metadata.method, str(metadata.seed)) or not path.exists():
            return None
        result = Comparison.from_json(path)
        inside = any(row.method == metadata.method and metadata.seed in row.seeds for row in result.rows)
        return result if inside else None

    @property
    def comparison_folder(self) -> Path:
        return self.run.path.resolve().parent.parent


def write_card(folder: Path, student: Provenance, license: str, repository: str | None) -> None:
    """Write README.md, and recipe.yaml if the run's configuration is beside the checkpoint."""
    if student.config is not None:
        (folder / "recipe.yaml").write_text(dump(student.config), encoding="utf-8")
    header = _header(student, license).to_yaml()
    text = _text(student, license, repository or "USER/NAME")
    ModelCard(f"---\n{header}\n---\n\n{text}").save(folder / "README.md")


def _header(student: Provenance, license: str) -> ModelCardData:
    metrics, result = student.metadata.metrics, None
    task = "image-classification" if student.network.num_classes else "image-feature-extraction"
    if "top1" in metrics:
        result = EvalResult(
            task_type="image-classification",
            dataset_type="imagefolder" if student.data_is_folder else visible(student.data_name),
            dataset_name=visible(student.data_name),
            dataset_split="validation",
            metric_type="accuracy",
            metric_name="top-1 accuracy",
            metric_value=round(metrics["top1"] / 100, 6),
        )
    return ModelCardData(
        library_name="timm",
        license=license,
        pipeline_tag=task,
        tags=[task, "timm", "irgdistill", "knowledge-distillation"],
        metrics=["accuracy"] if student.network.num_classes else None,
        model_name=student.network.architecture,
        eval_results=None if result is None else [result],
    )


def _text(student: Provenance, license: str, repository: str) -> str:
    """The card below its header, as Markdown. Sections without content are left out."""
    metadata, teacher = student.metadata, student.metadata.teacher
    teachers = [] if teacher is None else [teacher, *metadata.teachers]
    names = " and ".join(code_span(public_name(each.name)) for each in teachers)
    training = f"distilled from {names}" if names else "trained on labels alone"
    versions = ", ".join(f"{name} {version}" for name, version in metadata.versions.items())
    terms = f"Licence of the weights: {license}. The teacher and the data may have terms of their own."
    sections = {
        f"{student.network.architecture}, {training}": _summary(student),
        "Usage": _usage(student.network, repository),
        "Accuracy": _accuracy(student),
        "Comparison with other methods": _comparison(student),
        "Recipe": _recipe(student),
        "Matched stages": _matched_stages(metadata.plan),
        "Versions and licence": f"{versions}\n\n{terms}\n",
        "Citation": CITATION,
    }
    kept = [(title, text) for title, text in sections.items() if text]
    return "\n".join(f"{'##' if i else '#'} {title}\n\n{text}" for i, (title, text) in enumerate(kept))


# --- sections ---------------------------------------------------------------------------------------------------------


def _summary(student: Provenance) -> str:
    network = student.network
    size = "×".join(map(str, network.input.size))
    what, data = "An image encoder, its output an embedding", code_span(student.data_name)
    if network.num_classes:
        what = f"An image classifier for the {network.num_classes} classes of {data}"
    else:
        what += f", for images such as {data}"
    return (
        f"{what}, trained with irgdistill (method {code_span(student.metadata.method)}): "
        f"{parameters(network.model):,} parameters, {multiply_adds(network):,} multiply-adds at {size} pixels.\n"
    )


def _usage(network: Network, repository: str) -> str:
    lines = [
        "import timm",
        "from PIL import Image",
        "",
        f'model = timm.create_model("hf-hub:{repository}", pretrained=True).eval()  # or "local-dir:FOLDER"',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
    ]
    image = 'model(transform(Image.open("image.png").convert("RGB")).unsqueeze(0))'
    if network.num_classes:
        lines += [f"logits = {image}", 'print(model.pretrained_cfg["label_names"][logits.argmax()])', ""]
    else:
        lines += [f"embedding = {image}", "print(embedding.shape)", ""]
    note = ""
    if type(network.model).__module__.startswith("irgdistill."):
        note = (
            f"`{network.architecture}` is not part of timm: install irgdistill, whose import in the first line "
            "registers it.\n\n"
        )
        lines.insert(0, "import irgdistill.models")
    return note + "```python\n" + "\n".join(lines) + "```\n"


def _accuracy(student: Provenance) -> str:
    metrics, teacher = student.metadata.metrics, student.metadata.teacher
    if not metrics:
        return ""
    name = f"this student, after epoch {metrics['epoch']}"
    if "top1" not in metrics:  # validated without labels
        titles = {
            "agreement": "agreement with the teacher %",
            "knn_top1": "k-NN top-1 %",
            "neighbours": "nearest images shared with the teacher %",
        }
        known = [key for key in titles if key in metrics]
        rows = [["network", *(titles[key] for key in known), "validation images"]]
        rows.append([name, *(f"{metrics[key]:.2f}" for key in known), f"{metrics['images']:,}"])
        if "teacher_knn_top1" in metrics and teacher is not None:
            row = [f"teacher, {code_span(public_name(teacher.name))}", f"{metrics['teacher_knn_top1']:.2f}"]
            rows.append([*row, *["–"] * (len(known) - 1), f"{metrics['images']:,}"])
        return markdown_table(rows) + "\n" + _choice_of_epoch(student)
    rows = [["network", "top-1 %", "top-5 %", "validation images"]]
    rows.append([name, *_cells(metrics, "top1", "top5")])
    if teacher is not None and (found := _teacher_accuracy(student)) is not None:
        top1, images = found
        rows.append([f"teacher, {code_span(public_name(teacher.name))}", f"{top1:.2f}", "–", f"{images:,}"])
    return markdown_table(rows) + "\n" + _choice_of_epoch(student)


def _cells(metrics: Mapping[str, float], *names: str) -> list[str]:
    """Percentages, then the number of images."""
    percentages = [f"{metrics[name]:.2f}" if name in metrics else "–" for name in names]
    return [*percentages, f"{metrics['images']:,}" if "images" in metrics else "–"]


def _teacher_accuracy(student: Provenance) -> tuple[float, int] | None:
    """The teacher's top-1 accuracy, and on how many images: from the comparison, or from the check before training."""
    comparison = student.comparison
    if comparison is not None and comparison.teacher_top1 is not None:
        return comparison.teacher_top1, comparison.validation_images
    for record in records(student.run.metrics):
        if record["kind"] == "teacher":
            checked = TeacherCheck.parse(record, student.run.metrics)
            return checked.top1, checked.images
    return None


def _choice_of_epoch(student: Provenance) -> str:
    """Whether the validation images also chose the epoch."""
    metrics, run = student.metadata.metrics, student.run
    if not run.summary.exists():
        return "The run was not finished; these are the numbers of its last evaluation.\n" if run.state.exists() else ""
    summary = Summary.from_json(run.summary)
    if summary.epochs == 0:
        return "These are the initial weights: the run trained nothing.\n"
    if metrics["epoch"] == summary.epochs:
        return f"These are the weights after the last of {summary.epochs} epochs.\n"
    name = metric_name(metrics)
    value = summary.last_top1 if name == "top1" else summary.last_agreement
    last = "" if value is None else f"; after the last epoch {score({name: value})} %"
    return f"The best of {summary.epochs} epochs, chosen on these same images{last}.\n"


def _comparison(student: Provenance) -> str:
    """The table of the comparison that the run belongs to."""
    if student.comparison is None:
        return ""
    table = (student.comparison_folder / "compare.md").read_text(encoding="utf-8")
    this = f"{code_span(student.metadata.method)}, seed {student.metadata.seed}"
    return f"The same student trained by each method; this one is {this}.\n\n{table}"


def _recipe(student: Provenance) -> str:
    metadata, config = student.metadata, student.config
    terms = [_weighted(name, term) for name, term in metadata.losses.items() if term.weight]
    rows = [
        ["setting", "value"],
        ["method", code_span(metadata.method)],
        ["loss", " + ".join(terms)],
        ["data", f"{code_span(student.data_name)}, batches of {student.data.batch_size}"],
        ["seed", str(metadata.seed)],
    ]
    if config is None:
        return markdown_table(rows)
    optim, schedule = config.optim, config.schedule
    decay, warmup = f"weight decay {optim.weight_decay:g}", f"warm-up epochs: {schedule.warmup_epochs:g}"
    changed = config.augment.model_dump(exclude_defaults=True)
    rows += [
        ["epochs", str(schedule.epochs)],
        ["optimizer", f"{optim.name}, learning rate {optim.lr:g}, momentum {optim.momentum:g}, {decay}"],
        ["schedule", f"{schedule.name}, {warmup}"],
        ["augmentation", ", ".join(f"{name} {markdown(value)}" for name, value in changed.items()) or "the default"],
    ]
    options = " --data FOLDER" if student.data_is_folder else ""
    for option, key in TEACHER_FILES.items():
        paths = [getattr(teacher, key) for teacher in config.all_teachers]
        if any(paths):
            options += "".join(f" {option} {SKIPPED if path is None else shlex.quote(str(path))}" for path in paths)
    if config.student.checkpoint is not None:
        options += f" --student-checkpoint {shlex.quote(str(config.student.checkpoint))}"
    command = code_span(f"irgdistill distill --preset recipe.yaml{options}")
    return f"{markdown_table(rows)}\nTo train it again: {command}\n"


def _weighted(name: str, term: TermRecord) -> str:
    fade = term.fade
    schedule = "" if fade is None else f" (fades out between {fade[0]:.0%} and {fade[1]:.0%} of the training)"
    return f"{term.weight:g} · {markdown(name)}{schedule}"


def _matched_stages(plan: PlanRecord | None) -> str:
    if plan is None:
        return ""
    rows = [["stage", "teacher's last block", "student's last block", "widths"]]
    for pair in plan.pairs:
        taps = (pair.teacher.exit, pair.student.exit)
        widths = " / ".join(str(tap.channels) for tap in taps)
        rows.append([visible(pair.name), *(code_span(tap.module) for tap in taps), widths])
    return markdown_table(rows) + "".join(f"\n- {visible(note)}" for note in plan.notes) + "\n" * bool(plan.notes)
