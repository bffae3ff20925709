"""WCAG 2.2 AA: what axe-core finds in every tab and in both themes, and what it cannot find."""

from importlib.resources import files

import pytest
from browsing import choose_file, new_page, open_tab, press, set_number, wait_until_done

RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]


def violations(page):
    """What axe-core complains about, with the elements."""
    page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("rules => axe.run(document, { runOnly: rules })", RULES)["violations"]
    return [(each["id"], [node["html"] for node in each["nodes"]]) for each in found]


@pytest.fixture(params=["light", "dark"])
def themed(browser, app, request):
    page = new_page(browser, viewport={"width": 1200, "height": 1000})
    page.goto(f"{app.url}/?__theme={request.param}")
    page.get_by_role("tab", name="Caption").wait_for()
    yield page
    page.close()


@pytest.mark.slow
def test_no_violations_with_results_on_show(themed, pictures, tmp_path):
    pytest.importorskip("axe_playwright_python")
    assert violations(themed) == []
    choose_file(themed, pictures[0])
    tab = open_tab(themed, "Caption")
    set_number(tab, "Longest caption", 24)
    set_number(tab, "Number of captions", 2)
    set_number(tab, "Temperature", 1)
    press(themed, "Caption")
    wait_until_done(themed)
    press(themed, "Link to this result")
    themed.locator("#link a").wait_for()
    assert violations(themed) == []
    tab = open_tab(themed, "Reconstruct")
    set_number(tab, "Steps", 2)
    press(themed, "Reconstruct")
    wait_until_done(themed)
    assert violations(themed) == []
    tab = open_tab(themed, "Compose")
    choose_file(themed, pictures[1], "second")
    set_number(tab, "Number of shares", 2)
    press(themed, "Compose several shares")
    wait_until_done(themed, "2 pictures are composed.")
    broken = tmp_path / "text.png"
    broken.write_text("This is no picture.")
    themed.locator("#picture-second input[type=file]").set_input_files(broken)
    themed.locator("#picture-second").get_by_role("alert").get_by_text("text.png").wait_for()
    assert violations(themed) == []


def test_everything_is_reached_by_keyboard_with_a_visible_focus_and_has_room(page, pictures):
    """Every stop of the Tab key shows an outline, has a name, and is a target of at least 24 pixels."""
    choose_file(page, pictures[0])
    open_tab(page, "Caption")
    press(page, "Caption")
    wait_until_done(page)
    page.evaluate("scrollTo(0, 0)")
    page.mouse.click(3, 3)  # from here on, the Tab key begins at the top
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        found = page.evaluate(
            """() => {
                const it = document.activeElement;
                if (it === document.body) return null;
                const shown = it.type === 'file' ? it.parentElement : it;
                const style = getComputedStyle(shown), box = shown.getBoundingClientRect();
                const label = it.labels?.[0]?.innerText || it.getAttribute('aria-label') || it.innerText || it.title;
                return { html: it.outerHTML.slice(0, 200), label: (label ?? '').trim(), outline: style.outlineStyle,
                    width: box.width, height: box.height, inline: style.display === 'inline' };
            }"""
        )
        if found is None:
            break
        reached.append(found)
    names = [each["label"] for each in reached]
    assert any(name.startswith("Choose a file") for name in names) and "Example 1" in names
    assert {"Caption", "Stop", "Download as text"} <= set(names)
    for each in reached:
        assert each["label"], each
        assert each["outline"] != "none", each
        assert each["inline"] or min(each["width"], each["height"]) >= 24, each


def test_the_caption_is_announced_when_it_is_done(page, pictures):
    open_tab(page, "Caption")
    choose_file(page, pictures[0])
    press(page, "Caption")
    wait_until_done(page)
    page.locator("[role=status].visually-hidden").get_by_text("Done: ").wait_for(state="attached")
    page.get_by_role("textbox", name="Caption").first.wait_for()
