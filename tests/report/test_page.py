"""The page: whole, closed, safe against names from files, and honest about what is missing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medgen.report import write_report
from medgen.report.images import data_uri, mark
from medgen.report.latex import escape

_VOID = {"meta", "img", "br"}
_HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}&amp;'`"


class Page(HTMLParser):
    """What a browser would see: balanced tags, text, and addresses."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def of(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        found = [attrs for name, attrs in self.tags if name == tag]
        return [attrs for attrs in found if all(attrs.get(k.rstrip("_")) == v for k, v in wanted.items())]


def pictures(*names: str) -> dict[str, Image.Image]:
    return {name: Image.new("L", (40, 30), 90) for name in names}


def render(report: dict[str, Any], folder: Path, *names: str) -> Page:
    path = write_report(report, pictures(*names), folder / "report")
    assert path == folder / "report" / "index.html"
    assert {item.name for item in path.parent.iterdir()} == {"index.html", "report.tex"}
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def page(full: dict[str, Any], tmp_path: Path) -> Page:
    return render(full, tmp_path, "real", "synthetic", "pair 0", "pair 1")


def test_the_page_is_one_file_that_calls_nobody(page: Page) -> None:
    assert not page.of("script") and not page.of("link") and not page.of("iframe")
    for tag, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on")], tag
        for name in ("src", "href"):
            assert (attrs.get(name) or "#").startswith(("#", "data:image/")), (tag, attrs)
    targets = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {str(attrs["href"])[1:] for attrs in page.of("a")} <= targets
    policy = page.of("meta", **{"http-equiv": "Content-Security-Policy"})
    assert "default-src 'none'" in str(policy[0]["content"])


def test_the_sections_come_in_the_order_of_a_reading(page: Page) -> None:
    order = [str(attrs["id"]) for tag, attrs in page.tags if tag in ("section", "details") and "id" in attrs]
    expected = "compared sheets scores charts frd shift copies utility warnings methods technical"
    assert order == expected.split()
    assert page.text.index("Synthetic scans are told apart") < page.text.index("What was compared")


def test_every_picture_says_what_it_shows(page: Page) -> None:
    images = page.of("img")
    assert len(images) == 4 and all(attrs["alt"] for attrs in images)
    assert all(attrs.get("aria-label") for attrs in page.of("svg", role="img"))
    assert "SYNTHETIC scans from made" in page.text


def test_no_warning_and_no_rejected_scan_is_hidden(page: Page, full: dict[str, Any]) -> None:
    assert "A warning of the whole report." in page.text
    assert "torn expected a readable file" in page.text
    assert "2 synthetic scans: image is constant" in page.text
    for score in full["scores"].values():
        for warning in score["warnings"]:
            assert page.text.count(warning) == 1
    assert "1 rejected scan" in page.text[: page.text.index("What was compared")]


def test_every_score_is_in_the_table_with_its_direction(page: Page) -> None:
    for title in ("Fréchet distance", "Kernel distance", "Recall", "Vendi score", "FRD (frd-robust)", "FRD (frd-v1)"):
        assert re.search(rf"{re.escape(title)} [↓↑↔] ", page.text), title
    assert "the floor is 0 on average" in page.text  # why an unbiased distance has no ratio


def test_scans_and_pairs_are_named_where_the_pointer_rests(page: Page, full: dict[str, Any]) -> None:
    assert "synthetic: synthetic 3" in page.text
    assert page.text.count("looks like a copy") == 1 + sum(p["is_copy"] for p in full["memorization"]["pairs"])
    assert "Alaa et al. 2022" in page.text and "SHA-256 of the weights 579357935793" in page.text


def test_words_chart_and_effect_of_a_feature_are_all_of_means(full: dict[str, Any], tmp_path: Path) -> None:
    text = render(full, tmp_path).text
    assert "4 of 60 features differ by more than chance (smallest p = 0.005)." in text
    assert "+1.20 SD higher in synthetic p = 0.005 means 3.00 → 4.20" in text
    assert "real: mean 3.00, standard deviation 1.00" in text


def test_features_that_do_not_differ_are_not_shown_as_if_they_did(full: dict[str, Any], tmp_path: Path) -> None:
    for feature in full["radiomic_shift"]["largest"]:
        feature["p_value"] = 0.4
    full["radiomic_shift"]["beyond_chance"] = 0
    page = render(full, tmp_path)
    assert "None of 60 features differs by more than chance (smallest p = 0.40)." in page.text
    assert "The largest differences, all of them within chance" in page.text
    inside = page.tags[[tag for tag, _ in page.tags].index("section") :]
    shift = next(i for i, (_, attrs) in enumerate(inside) if attrs.get("id") == "shift")
    folded = next(attrs for tag, attrs in inside[shift:] if tag == "details")
    assert "open" not in folded


def test_the_page_says_which_scans_were_searched_and_counts_them_apart(full: dict[str, Any], tmp_path: Path) -> None:
    text = render(full, tmp_path / "a").text
    assert "compared with the 30 real training scans and, apart, with the 24 held-out ones" in text
    assert "1 of 26 close to a held-out scan 0.10 expected by chance" in text
    assert "SYNTHETIC sample 7 , real patient 60 : similarity 0.970" in text
    full["real"] |= {"train": 54, "val": 54}
    full["memorization"] |= {"searched": 54, "held_out": None}
    text = render(full, tmp_path / "b").text
    assert "compared with all 54 real scans, as the folder has no held-out part" in text


def test_the_page_says_what_p_and_interval_are_good_for(full: dict[str, Any], tmp_path: Path) -> None:
    text = render(full, tmp_path / "a").text
    assert text.count("tests whether the sets differ at all; the interval says by how much") == 1
    assert "no interval and no p , because it repeats the computation of published numbers" in text
    assert "The true p is larger" not in text
    full["frd"]["frd-robust"]["groups_real"] = 12
    text = render(full, tmp_path / "b").text
    assert text.count("patients are known for the real scans only") == 3  # verdict, table and section


def test_a_p_value_at_its_limit_is_marked(full: dict[str, Any], tmp_path: Path) -> None:
    shown = render(full, tmp_path / "a").text.count("smallest possible")
    full["scores"]["frechet"]["p_value"] = full["scores"]["kernel"]["p_value"] = 0.5
    assert render(full, tmp_path / "b").text.count("smallest possible") == shown - 2


def test_the_page_warns_of_the_pictures_of_patients_beside_it(page: Page) -> None:
    assert "the cache (in the folder cache beside it, unless another was chosen) holds small pictures" in page.text


def test_a_report_with_little_in_it_says_what_is_missing(minimal: dict[str, Any], tmp_path: Path) -> None:
    page = render(minimal, tmp_path)
    assert "not defined expected at least 4 patients in each set, got 3" in page.text
    assert "not defined there is no floor" in page.text
    assert "not defined not a finite number" in page.text  # FRD of identical sets
    assert "Copies were not looked for." in page.text and "No contact sheets were made." in page.text
    assert "2D, color" in page.text and "My score ↑ higher is better" in page.text
    assert "was not tested" in page.text and "there is no real-versus-real floor" in page.text.lower()
    assert not page.of("section", id="utility") and not page.of("section", id="shift")
    for word in ("None", "nan", "inf ", "Undefined"):
        assert not re.search(rf"\b{word}\b", page.text), word


@pytest.mark.parametrize("dims", [2, 3])
def test_names_from_files_stay_text(full: dict[str, Any], tmp_path: Path, dims: int) -> None:
    full["spatial_dims"] = dims
    full["real"]["folder"] = full["synthetic"]["folder"] = full["real"]["split"] = _HOSTILE
    full["memorization"]["pairs"][0] |= {"synthetic": _HOSTILE, "real": _HOSTILE, "pose": _HOSTILE}
    full["embedding"]["cases"]["synthetic"][0] = _HOSTILE
    full["warnings"] = [_HOSTILE]
    full["rejected"] = [{"set": "real", "case": _HOSTILE, "reason": _HOSTILE}]
    full["radiomic_shift"]["largest"][0]["feature"] = _HOSTILE
    full["memorization"]["held_out"]["pairs"][0] |= {"synthetic": _HOSTILE, "real": _HOSTILE}
    full["utility"]["classes"][0] = _HOSTILE
    full["extractor"]["name"] = _HOSTILE
    full["extractor"]["preprocessing"][_HOSTILE] = _HOSTILE
    full["frd"]["frd-robust"]["excluded"]["real"] = {_HOSTILE: 1}
    page = render(full, tmp_path, "real", "pair 0")
    assert not page.of("script") and not [a for a in page.of("img") if "onerror" in a]
    assert page.text.count("<script>alert(1)</script>") >= 10
    assert "{{ 7 * 7 }}" in page.text  # and is no template either
    table = (tmp_path / "report" / "report.tex").read_text(encoding="utf-8")
    assert r"\textgreater{}\textless{}script" in table


def test_a_value_that_is_not_a_number_is_shown_as_such(full: dict[str, Any], tmp_path: Path) -> None:
    full["scores"]["recall"] |= {"value": float("nan"), "missing": {"value": "too few neighbors"}}
    full["embedding"]["points"]["synthetic"][0] = [float("nan"), 1.0]
    full["memorization"]["c_t"] = None
    page = render(full, tmp_path)
    assert "not defined too few neighbors" in page.text
    assert "not defined needs enough unseen real scans" in page.text


def test_the_latex_table_has_a_row_for_each_score_and_escapes_text(full: dict[str, Any], tmp_path: Path) -> None:
    full["synthetic"]["folder"] = "100%_of $cases#1 & {more}"
    render(full, tmp_path)
    table = (tmp_path / "report" / "report.tex").read_text(encoding="utf-8")
    rows = table[table.index(r"\midrule") : table.index(r"\bottomrule")].count(r"\\")
    assert rows == len(full["scores"]) + len(full["frd"])
    assert all(line.count("&") - line.count(r"\&") == 6 for line in table.splitlines() if line.endswith(r"\\"))
    assert r"100\%\_of \$cases\#1 \& \{more\}" in table
    assert "−" not in table and "×" not in table


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\\b", r"a\textbackslash{}b"),
        ("~^", r"\textasciitilde{}\textasciicircum{}"),
        ("−1.2 × 10⁻⁵", r"$-$1.2 $\times$ 10$^{-5}$"),
        ("a\nb", "a b"),
        ("Fréchet", "Fréchet"),
    ],
)
def test_latex_shows_text_letter_by_letter(text: str, expected: str) -> None:
    assert escape(text) == expected


def test_a_sheet_carries_its_mark_in_its_pixels() -> None:
    plain = Image.new("L", (400, 100), 0)
    marked = mark(plain, "synthetic")
    assert marked.width == 400 and marked.height > 100
    assert marked.getpixel((399, 0)) == (232, 119, 34) and marked.getpixel((200, 110)) == (0, 0, 0)
    assert data_uri(marked).startswith("data:image/png;base64,")
