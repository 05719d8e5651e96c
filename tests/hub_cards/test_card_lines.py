"""The merge of a card: what this version states replaces what nobody edited, and nothing that anybody wrote is lost."""

import random

import pytest

from foveate.hub_cards.card_lines import line_digests, merge_card


WRITTEN = """# Title

Made by the old version.
It runs on 4.

## Saves

| old | row |

Old account.

## Limits

- one
- two
"""
NEW = WRITTEN.replace("It runs on 4.", "It runs on 4 and 5.").replace("old | row", "new | row").replace("- two", "- 2")


def merged(present: str, written: str = WRITTEN, new: str = NEW):
    return merge_card(line_digests(written), present, new)


def test_a_card_that_nobody_edited_becomes_the_new_one():
    assert merged(WRITTEN).text == NEW
    assert merged(WRITTEN).num_kept == 0


def test_a_card_that_is_new_already_stays():
    assert merged(NEW).text == NEW
    assert merged(NEW).num_kept == 0


@pytest.mark.parametrize("line", [line for line in WRITTEN.splitlines() if line])
def test_a_paragraph_that_was_added_anywhere_stays_there(line):
    """Before each line in turn, with the facts around it brought up to date."""
    present = WRITTEN.replace(line + "\n", f"My own words.\n\n{line}\n", 1)
    of_new = dict(zip(WRITTEN.splitlines(), NEW.splitlines()))[line]
    assert merged(present).text == NEW.replace(of_new + "\n", f"My own words.\n\n{of_new}\n", 1)
    assert merged(present).num_kept == 0


def test_a_sentence_that_was_edited_stays_as_it_is():
    present = WRITTEN.replace("Old account.", "My account.")
    assert merged(present).text == NEW.replace("Old account.", "My account.")


def test_where_both_changed_a_passage_the_edited_one_stays_and_is_counted():
    present = WRITTEN.replace("It runs on 4.", "It runs on my machine.")
    found = merged(present)
    assert found.text == NEW.replace("It runs on 4 and 5.", "It runs on my machine.")
    assert found.num_kept == 1


def test_what_was_deleted_stays_deleted():
    present = WRITTEN.replace("## Saves\n\n| old | row |\n\nOld account.\n\n", "")
    found = merged(present)
    assert "row" not in found.text and "It runs on 4 and 5." in found.text


def test_a_new_sentence_goes_where_its_neighbours_are():
    new = WRITTEN.replace("Old account.\n", "Old account.\nA new sentence.\n")
    assert merged(WRITTEN, new=new).text == new
    without = WRITTEN.replace("Old account.", "Mine.")
    assert "A new sentence." not in merged(without, new=new).text


def test_a_new_paragraph_stands_before_an_edited_one():
    new = WRITTEN.replace("## Limits\n", "A new paragraph.\n\n## Limits\n")
    edited = WRITTEN.replace("## Limits", "## My limits")
    assert merged(edited, new=new).text == new.replace("## Limits", "## My limits")


def test_a_card_of_ones_own_is_left_alone():
    assert merged("# Mine\n\nNothing else.\n").text == "# Mine\n\nNothing else.\n"


def test_line_ends_stay_as_they_are():
    assert merged(WRITTEN.replace("\n", "\r\n")).text == NEW.replace("\n", "\r\n")


def test_no_line_of_ones_own_is_lost_or_moved():
    """Random edits: all lines that were added or changed are there, in their order."""
    rng = random.Random(0)
    for _ in range(300):
        lines = WRITTEN.splitlines()
        for number in range(rng.randint(1, 5)):
            place = rng.randrange(len(lines) + 1)
            kind = rng.choice(("insert", "replace", "delete"))
            lines[place : place + (kind != "insert")] = [] if kind == "delete" else [f"own {number}"]
        own = [line for line in lines if line.startswith("own")]
        found = merged("\n".join(lines) + "\n")
        assert [line for line in found.text.splitlines() if line.startswith("own")] == own
        again = merge_card(line_digests(NEW), found.text, NEW)
        assert again.text == found.text, "a second time changes nothing"
