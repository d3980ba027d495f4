"""Random subsets, halves and relabelings of scans, in which the scans of one patient stay together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

Groups = list[list[int]]  # rows of each group; lists, because thousands of tiny tensors are slow to join


def group_rows(groups: Sequence[object] | np.ndarray | None, count: int, *, offset: int = 0, name: str) -> Groups:
    """Rows of each group, in the order in which groups first appear.

    Args:
        groups: Identifier of each scan's group (its patient), or None where each scan is a group of its own.
        count: Number of scans.
        offset: Row of the first scan in the pool.
        name: Of the argument, for the message of an error.

    Returns:
        One list of rows per group.

    Raises:
        ValueError: If there is not one identifier per scan.
    """
    if groups is None:
        return [[offset + row] for row in range(count)]
    if len(groups) != count:
        raise ValueError(f"{name}: expected one identifier for each of {count} scans, got {len(groups)}.")
    rows: dict[object, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(offset + row)
    return list(rows.values())


def join(groups: Groups) -> torch.Tensor:
    """Rows of all groups.

    Args:
        groups: Rows of each group.

    Returns:
        ``(sum of sizes,)`` rows.
    """
    return torch.tensor([row for rows in groups for row in rows], dtype=torch.int64)


def shuffled(groups: Groups, generator: torch.Generator) -> Groups:
    """The groups in random order.

    Args:
        groups: Rows of each group.
        generator: Source of the order.

    Returns:
        The same groups.
    """
    return [groups[index] for index in torch.randperm(len(groups), generator=generator).tolist()]


def draw_half(groups: Groups, generator: torch.Generator) -> torch.Tensor:
    """Rows of a random half of the groups.

    Args:
        groups: Rows of each group, at least two.
        generator: Source of the draw.

    Returns:
        Rows of ``len(groups) // 2`` groups.
    """
    return join(shuffled(groups, generator)[: len(groups) // 2])


def draw_halves(groups: Groups, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A random split in two, with about as many scans on either side.

    Args:
        groups: Rows of each group, at least two.
        generator: Source of the draw.

    Returns:
        Rows of either side, in random order of groups.
    """
    sides: tuple[Groups, Groups] = ([], [])
    sizes = [0, 0]
    for rows in shuffled(groups, generator):
        smaller = int(sizes[1] < sizes[0])
        sides[smaller].append(rows)
        sizes[smaller] += len(rows)
    return join(sides[0]), join(sides[1])


def draw_subset(groups: Groups, size: int, generator: torch.Generator) -> torch.Tensor:
    """A random subset of exactly `size` scans, of as few groups as come first; the last one may be cut.

    Args:
        groups: Rows of each group.
        size: Number of scans, at most all.
        generator: Source of the draw.

    Returns:
        ``(size,)`` rows.
    """
    return join(shuffled(groups, generator))[:size]


def relabel(groups: Groups, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A random relabeling of pooled groups as first and second set, as if the labels meant nothing.

    Args:
        groups: Rows of each group of both sets.
        size: Scans of the first set; it is met exactly where groups are single scans, else as nearly as they come.
        generator: Source of the draw.

    Returns:
        Rows of the first and of the second set.
    """
    ordered = shuffled(groups, generator)
    ends = np.cumsum([len(rows) for rows in ordered])
    cut = min(int(np.abs(ends - size).argmin()) + 1, len(ordered) - 1)
    return join(ordered[:cut]), join(ordered[cut:])
