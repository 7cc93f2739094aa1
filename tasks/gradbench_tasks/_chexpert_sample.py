"""Draws the sample: patients, studies and films in CheXpert's own layout, beside small pictures."""

from __future__ import annotations

import csv
from dataclasses import fields
from pathlib import Path

import numpy as np
from PIL import Image

from gradbench import seeding
from gradbench_tasks._chexpert_beam import Chests, Field
from gradbench_tasks._chexpert_frontal import Frontal
from gradbench_tasks._chexpert_lateral import Lateral
from gradbench_tasks._chexpert_patterns import PATTERNS, draw_class

SEED = 20190107  # of everything that is drawn
PATIENTS = {"train": 420, "valid": 220}
FIRST_PATIENT = {"train": 1, "valid": 64541}  # as the two are numbered in the release
PICTURES = 60  # a class
QUALITY = 90  # of the JPEG files
BATCH = 8  # films that are drawn at once; what is drawn depends on it

FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
PRESENT = (0.26, 0.24, 0.18, 0.27, 0.34)  # shares of studies
# of the hidden causes of the findings: failing hearts bring water, and water presses on lungs
TOGETHER = np.array(
    [
        [1.0, 0.1, 0.2, 0.2, 0.5],
        [0.1, 1.0, 0.0, 0.5, 0.3],
        [0.2, 0.0, 1.0, 0.1, 0.2],
        [0.2, 0.5, 0.1, 1.0, 0.4],
        [0.5, 0.3, 0.2, 0.4, 1.0],
    ]
)
STEADY = 0.6  # share of the hidden cause that stays with the patient from study to study
FAINT = 0.45  # present findings below this severity are often called uncertain
COLUMNS = (
    "Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", "Enlarged Cardiomediastinum",
    "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
    "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)  # fmt: skip


def draw_films(folder: Path) -> None:
    """Write ``train.csv``, ``valid.csv`` and their films, in the layout of the small release."""
    folder.mkdir()
    for split in PATIENTS:
        rows, chests, is_lateral = _patients(split)
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            table.writeheader()
            table.writerows({**row, "Path": f"{folder.name}/{row['Path']}"} for row in rows)
        for kind, draws in ((False, Frontal), (True, Lateral)):
            members = np.flatnonzero(is_lateral == kind)
            for start in range(0, len(members), BATCH):
                chosen = members[start : start + BATCH]
                draw = seeding.rng(SEED, split, draws.__name__, start)
                films = draws(_subset(chests, chosen), draw).film()
                for index, film in zip(chosen, films, strict=True):
                    path = folder / rows[index]["Path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(film).save(path, quality=QUALITY)


def draw_pictures(folder: Path) -> None:
    """Write classes of shapes and textures in the layout of Tiny-ImageNet."""
    names = {f"n{90000001 + place}": name for place, name in enumerate(PATTERNS)}
    for wnid, name in names.items():
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        pictures = draw_class(name, PICTURES, seeding.rng(SEED, "pictures", name))
        for place, picture in enumerate(pictures):
            Image.fromarray(picture).save(images / f"{wnid}_{place}.JPEG", quality=QUALITY)
    words = "".join(f"{wnid}\t{name}\n" for wnid, name in names.items())
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in names), encoding="utf-8")
    (folder / "words.txt").write_text(words, encoding="utf-8")


def _patients(split: str) -> tuple[list[dict[str, str]], Chests, Field]:
    """Return the rows of a table, the chests of its films, and which films are lateral."""
    count = PATIENTS[split]
    draw = seeding.rng(SEED, split, "patients")
    studies_of = 1 + (draw.random(count) < 0.45) + (draw.random(count) < 0.2)
    if split == "valid":
        studies_of[:] = 1
    patient = np.repeat(np.arange(count), studies_of)  # (S,) of each study
    number = np.arange(len(patient)) - np.repeat(np.cumsum(studies_of) - studies_of, studies_of)
    cholesky = np.linalg.cholesky(TOGETHER)
    lasting = draw.standard_normal((count, len(FINDINGS))) @ cholesky.T
    passing = draw.standard_normal((len(patient), len(FINDINGS))) @ cholesky.T
    cause = np.sqrt(STEADY) * lasting[patient] + np.sqrt(1 - STEADY) * passing  # (S, 5)
    limits = [np.quantile(of, 1 - share) for of, share in zip(cause.T, PRESENT, strict=True)]
    severity, labels = _reported(cause - limits, split, draw)
    ill = (severity > 0).any(1)
    portable = draw.random(len(patient)) < 0.35 + 0.35 * ill
    # a second frontal film, a lateral one beside a film taken standing up
    views = [["frontal"] for _ in patient]
    for s, (more, beside) in enumerate(draw.random((len(patient), 2))):
        views[s] += ["frontal"] if more < 0.25 else []
        views[s] += ["lateral"] if beside < 0.2 and not portable[s] else []
    study = np.repeat(np.arange(len(patient)), [len(each) for each in views])  # (F,) of each film
    is_lateral = np.array([view == "lateral" for each in views for view in each])
    body = _bodies(count, draw)
    chests = _filmed(body, patient[study], study, severity, portable, is_lateral, draw)
    place = np.concatenate([np.arange(1, len(each) + 1) for each in views])
    rows = []
    for film, s in enumerate(study.tolist()):
        who, view = FIRST_PATIENT[split] + patient[s], "lateral" if is_lateral[film] else "frontal"
        where = f"patient{who:05d}/study{number[s] + 1}/view{place[film]}_{view}.jpg"
        rows.append(
            {
                "Path": f"{split}/{where}",
                "Sex": "Female" if body["female"][patient[s]] else "Male",
                "Age": str(int(body["age"][patient[s]])),
                "Frontal/Lateral": view.capitalize(),
                "AP/PA": "" if is_lateral[film] else "AP" if portable[s] else "PA",
                **dict(zip(FINDINGS, labels[s], strict=True)),
                **_other_labels(labels[s], bool(chests.wires[film]), split),
            }
        )
    return rows, chests, is_lateral


def _reported(beyond: Field, split: str, draw: np.random.Generator) -> tuple[Field, Field]:
    """Return severities (S, 5) in [0, 1] and what the table says of them.

    Readers of the official validation films are sure of everything; reports leave absent findings
    out, and some present ones, and call faint ones uncertain.
    """
    severity = np.where(beyond > 0, np.clip(0.3 + 0.45 * beyond, 0, 1), 0)
    present = severity > 0
    if split == "valid":
        return severity, np.where(present, "1.0", "0.0")
    chance = draw.random((2, *severity.shape))
    hinted = ~present & (chance[0] < 0.04)
    unsure = (present & (severity < FAINT) & (chance[0] < 0.4)) | hinted
    labels = np.where(present, np.where(chance[1] < 0.03, "", "1.0"), "")
    labels = np.where(~present & (chance[1] < 0.35), "0.0", labels)
    severity = np.where(hinted, 0.18, np.where(unsure, 0.7 * severity, severity))
    return severity, np.where(unsure, "-1.0", labels)


def _other_labels(labels: Field, wires: bool, split: str) -> dict[str, str]:
    """Return the columns that no objective reads."""
    absent = "0.0" if split == "valid" else ""
    found = dict(zip(FINDINGS, labels, strict=True))
    hazy = any(found[name] == "1.0" for name in ("Atelectasis", "Consolidation", "Edema"))
    others = dict.fromkeys(COLUMNS[5:], absent) | {
        "Enlarged Cardiomediastinum": found["Cardiomegaly"] if split == "valid" else "",
        "Lung Opacity": "1.0" if hazy else absent,
        "No Finding": absent if any(label in ("1.0", "-1.0") for label in labels) else "1.0",
        "Support Devices": "1.0" if wires else absent,
    }
    return {name: label for name, label in others.items() if name not in FINDINGS}


def _bodies(count: int, draw: np.random.Generator) -> dict[str, Field]:
    """Return what stays the same in all films of a patient, (P,) each."""
    female, age = draw.random(count) < 0.45, np.clip(draw.normal(60, 17, count), 18, 90)
    return {
        "female": female,
        "age": age,
        "width": draw.normal(1.01, 0.04, count) - 0.03 * female,
        "height": draw.normal(0.5, 0.05, count),
        "heart": draw.normal(0.44, 0.03, count) + 0.0006 * (age - 60),
        "tilt": np.clip(draw.normal(0, 0.5, count), -1, 1),
        "knob": np.clip((age - 30) / 60 + draw.normal(0, 0.2, count), 0, 1),
        "ribs": draw.normal(0.2, 0.012, count),
        "phase": draw.random(count),
        "bone": draw.normal(1, 0.15, count) - 0.004 * (age - 60),
        "bulk": np.clip(draw.normal(0.4, 0.4, count), -0.3, 1.4),
        "breast": female * draw.uniform(0.3, 1.2, count),
        "curve": draw.normal(0, 0.6, count),
        "side": np.where(draw.random(count) < 0.5, -1.0, 1.0),
    }


def _filmed(
    body: dict[str, Field],
    patient: Field,
    study: Field,
    severity: Field,
    portable: Field,
    is_lateral: Field,
    draw: np.random.Generator,
) -> Chests:
    """Return the chests of all films: bodies, what a study found, how each film was taken."""
    films, studies = len(study), len(portable)
    both, places = draw.random(studies) < 0.35, draw.random((studies, 4))
    wires = portable & (draw.random(studies) < 0.5)
    of_body = {
        field.name: body[field.name][patient] for field in fields(Chests) if field.name in body
    }
    values = of_body | {
        "height": of_body["height"] + draw.normal(0, 0.025, films),
        "portable": portable[study] & ~is_lateral,
        "turn": draw.normal(0, 0.035, films),
        "shift": draw.normal(0, 0.035, (films, 2)),
        "zoom": draw.normal(0.94, 0.035, films),
        "exposure": draw.normal(0, 0.14, films),
        "both": both[study],
        "place": places[study],
        "wires": wires[study] & ~is_lateral,
        "cardiomegaly": severity[study, 1],
        "edema": severity[study, 3],
        "consolidation": severity[study, 2],
        "atelectasis": severity[study, 0],
        "effusion": severity[study, 4],
    }
    return Chests(**{name: value.astype(np.float32) for name, value in values.items()})


def _subset(chests: Chests, chosen: Field) -> Chests:
    return Chests(**{field.name: getattr(chests, field.name)[chosen] for field in fields(Chests)})
