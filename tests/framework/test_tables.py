from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gradbench.data.tables import read_table
from gradbench.errors import DataError


def table(tmp_path: Path, text: str | bytes) -> Path:
    file = tmp_path / "table.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_classes_are_read(tmp_path: Path) -> None:
    found = read_table(
        table(tmp_path, "label,age,path\ndog,3,b/1.png\ncat, ,./a.png\ndog,,c.png\n")
    )
    assert found.root == tmp_path
    assert found.ids == ("a.png", "b/1.png", "c.png")
    assert found.names == ("cat", "dog")
    assert found.targets.tolist() == [0, 1, 1]
    assert found.targets.dtype == np.int64
    assert found.groups is None
    assert not found.is_multilabel
    assert found.paths(np.array([1])) == [tmp_path / "b/1.png"]
    assert found.marks() == [(0,), (1,), (1,)]


def test_labels_are_read(tmp_path: Path) -> None:
    text = "path,group,edema,fracture\nb.png,p 2,1,\na.png,p 1,0.0,1.0\nc.png,p 2,,0\n"
    found = read_table(table(tmp_path, text))
    assert found.ids == ("a.png", "b.png", "c.png")
    assert found.names == ("edema", "fracture")
    np.testing.assert_array_equal(found.targets, [[0, 1], [1, np.nan], [np.nan, 0]])
    assert found.targets.dtype == np.float32
    assert found.groups == ("p 1", "p 2", "p 2")
    assert found.is_multilabel
    assert found.marks() == [(0, 3), (1,), (2,)]
    assert found.scored(np.arange(3)) == {"edema", "fracture"}
    assert found.scored(np.arange(2)) == {"edema"}


def test_chosen_columns_are_labels_whatever_the_others_are(tmp_path: Path) -> None:
    file = table(tmp_path, "path,label,age,u,v\na.png,x,70,1,0\nb.png,y,71,0,1\n")
    assert read_table(file, ["v", "u", "elsewhere"]).names == ("v", "u")
    assert read_table(file, ["elsewhere"]).names == ("x", "y")
    assert read_table(file).names == ("x", "y")


@pytest.mark.parametrize(
    "text",
    [
        "path,label\r\na.png,x\r\nb.png,y\r\n",
        "\ufeffpath,label\na.png,x\nb.png,y\n",
        'path,label\n"a.png","x"\n\n , \nb.png,y',
        "path , label\n a.png,x \nb.png,\ty\n",
        "path,label\nb.png,y\n./a.png,x\n",
    ],
    ids=["Windows", "byte-order mark", "quotes and empty rows", "blanks", "another order"],
)
def test_spelling_does_not_matter(tmp_path: Path, text: str) -> None:
    plain = read_table(table(tmp_path, "path,label\na.png,x\nb.png,y\n"))
    expected = list(plain.described())
    assert list(read_table(table(tmp_path, text)).described()) == expected


def test_paths_of_windows_and_of_parents_are_understood(tmp_path: Path) -> None:
    file = table(tmp_path, "path,label\nfilms\\1.png,x\n../films/2.png,y\n")
    found = read_table(file)
    assert found.ids == ("../films/2.png", "films/1.png")
    assert found.places()[0] == str(tmp_path.resolve().parent / "films/2.png")


def test_what_is_known_without_opening_an_image_is_described(tmp_path: Path) -> None:
    text = "path,u,v,group\na.png,1,0,1\nb.png,0,,2\n"
    first = list(read_table(table(tmp_path, text)).described())
    for one, other in (("a.png", "c.png"), ("1,0,1", "1,1,1"), (",2", ",3"), (",u", ",w")):
        changed = text.replace(one, other)
        assert list(read_table(table(tmp_path, changed)).described()) != first


def test_a_folder_of_classes_is_a_table(tmp_path: Path) -> None:
    for name in ("b/x/1.png", "a/2.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    found = read_table(tmp_path)
    assert found.ids == ("a/2.png", "b/x/1.png")
    assert found.names == ("a", "b")
    assert found.targets.tolist() == [0, 1]
    assert found.groups is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["empty file"]),
        ("\n \n", ["empty file"]),
        ("path,label\n", ["a header alone"]),
        ("file,label\na.png,x\n", ["column 'path'", "file, label"]),
        ("Path,label\na.png,x\n", ["rename 'Path'"]),
        ("path;label\na.png;x\n", ["separate columns by commas"]),
        ("path,group\na.png,x\n", ["column 'label', or a column a label"]),
        ("path,label,label\na.png,x,x\n", ["found more of label"]),
        ("path,,label\na.png,,x\n", ["none for column 2"]),
        ("path,label\na.png,x\nb.png,x\n", ["found one, 'x'"]),
        ("path,u\na.png,1\nb.png,\n", ["with both 0 and 1", "among u"]),
        ('path,label\n"a.png,x\n', ["row 2: unexpected end of data"]),
        ("path,label\na.png,größe\n".encode("latin-1"), ["byte 0xf6 in row 2", "UTF-8"]),
        (
            "path,label,group\na.png,x,1\n,x,1\n/b.png,y,1\nC:/c.png,y,1\n",
            ["found 3", "row 3: ''", "row 4: '/b.png'", "row 5: 'C:/c.png' instead of a relative"],
        ),
        (
            "path,label,group\na.png,x,1\n./a.png,y,1\nc.png,,1\nd.png,y,\ne.png,y\nf.png,,1\n",
            [
                *("found 5", "row 3: 'a.png' again, as in row 2", "rows 4, 7: no label"),
                *("row 5: no group", "row 6: 2 cells instead of 3"),
            ],
        ),
        (
            "path,u,v\na.png,-1,0\nb.png,1,yes\nc.png,-1,1\n",
            [
                *("found 3", "rows 2, 4: u '-1' instead of 0, 1 or blank", "row 3: v 'yes'"),
                "Read as labels are u, v; `labels` chooses among them.",
            ],
        ),
    ],
)
def test_what_is_wrong_is_said_at_once(
    tmp_path: Path, text: str | bytes, expected: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        read_table(table(tmp_path, text))
    for part in (str(tmp_path / "table.csv"), *expected):
        assert part in str(caught.value)


def test_many_bad_rows_are_counted(tmp_path: Path) -> None:
    rows = "".join(f"{i}.png,2\n" for i in range(150))
    with pytest.raises(DataError, match=r"found 150 .* rows 2, 3, .* … and 50 more: u '2'"):
        read_table(table(tmp_path, f"path,u\n{rows}"))


def test_a_place_without_data_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found nothing there"):
        read_table(tmp_path / "absent")
    (tmp_path / "table.txt").touch()
    with pytest.raises(DataError, match=r"a folder or a \.csv file, found the file"):
        read_table(tmp_path / "table.txt")
