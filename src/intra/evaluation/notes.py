"""What the reader of an evaluation's figures should know of the photos that they come from."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from intra.data.folder import LabelledImage

__all__ = ["notes_on_tests", "notes_on_the_region", "notes_on_the_setup"]


def notes_on_tests(tests: Sequence[LabelledImage], left_out: Sequence[LabelledImage]) -> list[str]:
    """What was left out, and what has no mask."""
    notes = []
    if left_out:
        note = (f"{len(left_out)} good test images are left out: the model was trained or calibrated on these very "
                "files.")
        if all(test.label for test in tests):
            note += " To learn how many good parts it rejects, test it on good photos that it has not seen."
        notes.append(note)
    anomalous = [test for test in tests if test.label]
    without = sum(test.mask is None for test in anomalous)
    if 0 < without < len(anomalous):
        notes.append(f"{without} of {len(anomalous)} anomalous images have no mask; the pixel figures leave them out.")
    return notes


def notes_on_the_region(px: Mapping[str, int]) -> list[str]:
    """How much of photos and defects lies inside the region of interest; nothing without one."""
    if not px:
        return []
    note = f"The pixel figures are of the region of interest alone, {px['inside'] / px['photo']:.1%} of the photos."
    outside = px["defect"] - px["defect inside"]
    return [note + (f" {outside} of {px['defect']} defect pixels lie outside it." if px["defect"] else "")]


def notes_on_the_setup(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many photos raise the setup alarm, and why."""
    alarms = Counter(row["setup_reason"] for row in rows if row["setup_alarm"])
    if not alarms:
        return []
    listed = ", ".join(f"{reason} ({count})" for reason, count in alarms.most_common())
    return [f"{sum(alarms.values())} of {len(rows)} photos raise the setup alarm: as a whole they are not as the good "
            f"photos were: {listed}. In use their verdict is SETUP; the figures here are of their scores."]
