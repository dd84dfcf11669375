"""What a stage kept, changed and left out, and why: counted, listed, printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fasttrain_data.errors import UserError
from fasttrain_data.jsonl import dump_row, whole_file


class Account:
    """Counts by group (a source file, for example) and reason, and a file that lists every row left out.

    Only the counts are held in memory.
    """

    def __init__(self, listing: IO[bytes] | None = None) -> None:
        self.kept: Counter[str] = Counter()
        self.changed: dict[str, Counter[str]] = {}
        self.dropped: dict[str, Counter[str]] = {}
        self.notes: list[str] = []
        self._listing = listing
        self.first_detail = ""

    def keep(self, group: str, count: int = 1) -> None:
        self.kept[group] += count

    def change(self, group: str, what: str, count: int = 1) -> None:
        self.changed.setdefault(group, Counter())[what] += count

    def drop(self, group: str, reason: str, where: str, detail: str = "") -> None:
        self.dropped.setdefault(group, Counter())[reason] += 1
        self.first_detail = self.first_detail or detail
        if self._listing is not None:
            row: dict[str, Any] = {"where": where, "reason": reason}
            if detail:
                row["detail"] = detail
            self._listing.write((dump_row(row) + "\n").encode())

    def total_dropped(self, reason: str | None = None) -> int:
        counters = self.dropped.values()
        return sum(counter[reason] if reason else counter.total() for counter in counters)

    def total_kept(self) -> int:
        return self.kept.total()

    def check_any_kept(self, source: object, wanted: str) -> None:
        """UserError with the reasons if nothing was kept; to be called before the output takes its name."""
        if not self.total_kept():
            raise self.nothing_left(source, wanted)

    def nothing_left(self, source: object, wanted: str, hint: str = "") -> UserError:
        """The mistake that everything was left out, with the reasons; no listing is written then."""
        counts: Counter[str] = sum(self.dropped.values(), Counter())
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
        return UserError(f"{source}: wanted at least one {wanted}, got none ({reasons or 'no rows'}){hint}")

    def lines(self) -> Iterator[str]:
        """The account as indented text, one group after the other."""
        for group in dict.fromkeys([*self.kept, *self.dropped, *self.changed]):
            dropped, changed = self.dropped.get(group, Counter()), self.changed.get(group, Counter())
            read = self.kept[group] + dropped.total()
            yield f"{group}: {read:,} read, {self.kept[group]:,} kept" if read else f"{group}:"
            yield from (f"  changed {count:>8,}  {what}" for what, count in changed.most_common())
            yield from (f"  dropped {count:>8,}  {reason}" for reason, count in dropped.most_common())
        yield from self.notes

    def as_dict(self) -> dict[str, Any]:
        return {
            "kept": dict(self.kept),
            "changed": {group: dict(counter) for group, counter in self.changed.items()},
            "dropped": {group: dict(counter) for group, counter in self.dropped.items()},
        }


def listing_path(output: Path) -> Path:
    """Where a stage that writes `output` lists what it left out: `x.jsonl` -> `x.skipped.jsonl`."""
    return output.with_name(f"{output.stem}.skipped.jsonl")


@contextmanager
def account_of(output: Path) -> Iterator[Account]:
    """An account whose listing stands beside `output`; no file is left when nothing was left out.

    The listing of an earlier run is replaced only when the block ends well: it belongs to the output that is there.
    """
    path = listing_path(output)
    with whole_file(path) as file:
        account = Account(file)
        yield account
    if not account.total_dropped():
        path.unlink()
