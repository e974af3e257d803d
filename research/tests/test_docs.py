"""The tables of the docs are what their JSON files say."""

from pathlib import Path

import pytest
from research.reproduce.ablations import ABLATIONS
from research.reproduce.docs import fill, load_grid, main, save_results
from research.reproduce.run import SCHEMA, VERSION
from research.reproduce.tables import table1, table2
from research.tests.cells import a_cell

from hicode.errors import FileFormatError
from hicode.files import write_json
from hicode.provenance import plain

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = "# Results\n\n<!-- table: speed -->\n<!-- end -->\n\nText.\n\n<!-- table: other -->\n| a |\n<!-- end -->\n"


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    save_results(folder / "speed.json", ["part", "ms"], [["render", 5.1], ["paste", "3 ± 1"]], "python -m benchmark")
    return folder


def test_a_section_gets_the_table_of_its_file_and_the_rest_of_the_page_stays(results):
    filled = fill(PAGE, results)
    table = "| part | ms |\n|---|---|\n| render | 5.1 |\n| paste | 3 ± 1 |\n"
    assert filled.text == PAGE.replace("speed -->\n", f"speed -->\n{table}")
    assert filled.changed == ("speed",) and filled.missing == ("other",)


def test_filling_a_filled_page_changes_nothing(results):
    once = fill(PAGE, results)
    twice = fill(once.text, results)
    assert twice.text == once.text and twice.changed == ()


def test_the_command_writes_the_page_and_check_only_tells(results, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert main(page, results, check=True) == 1
    assert page.read_text() == PAGE and "out of date" in capsys.readouterr().out
    assert main(page, results) == 0 and "| render | 5.1 |" in page.read_text()
    assert main(page, results, check=True) == 0


def test_a_table_without_an_end_is_refused(results):
    with pytest.raises(FileFormatError, match="not each one ends"):
        fill(PAGE + "<!-- table: more -->\n", results)


def test_a_foreign_file_is_refused(results):
    write_json(results / "speed.json", {"schema": "something-else", "version": 1})
    with pytest.raises(FileFormatError, match="something-else"):
        load_grid(results / "speed.json")


@pytest.mark.parametrize("table", ["table1", "table2"])
def test_what_reproduce_writes_becomes_a_table_with_every_row(table, tmp_path):
    if table == "table1":
        made = table1([a_cell(row="draft")], ["draft"])
        titles = ["ground truth", "control: a static mean head", "hicode draft, driven by sound"]
    else:
        made = table2([a_cell(row=row, seed=seed, psnr=30 + seed) for row in ABLATIONS for seed in (0, 1)])
        titles = [row.title for row in ABLATIONS.values()]
    content = {"schema": SCHEMA, "version": VERSION, "table": table, "figures": made.data}
    write_json(tmp_path / "t.json", plain(content))
    grid = load_grid(tmp_path / "t.json")
    assert set(titles) <= {row[0] for row in grid.rows}
    assert all(len(row) == len(grid.columns) for row in grid.rows)
    if table == "table2":
        assert "30.50 ± 0.71" in grid.markdown()


def test_the_tables_of_this_repository_are_up_to_date():
    page = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")
    filled = fill(page, REPOSITORY / "docs" / "results")
    assert filled.changed == (), "run python -m research.reproduce.docs"
