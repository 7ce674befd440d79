"""The identity of KV blocks: which sequences hold the same tokens, and up to where.

vLLM chains hashes, so a block is known by its tokens and all tokens before it. Here tokens come as named
segments, and a chain of names is a path in a tree: the block that ends inside a node is the same block for
every sequence whose path goes through that node. Comparing names costs one dictionary look-up per segment,
however many blocks it spans.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from servesim.kv.block_pool import Extent

__all__ = ["ContentTree", "Node"]


class Node:
    """A segment at the end of one particular chain of segments; it begins at token ``start``.

    ``extents`` are the cached blocks that end inside it, in the order in which they were cached.
    """

    __slots__ = ("__weakref__", "extents", "parent", "serial", "start")

    def __init__(self, start: int, parent: Node | None, serial: int) -> None:
        self.start = start
        self.parent = parent  # keeps the chain alive: the tree holds its nodes weakly
        self.serial = serial  # no other node of the tree has it
        self.extents: list[Extent] = []


class ContentTree:
    """All chains of named segments that some sequence or some cached block still knows."""

    def __init__(self) -> None:
        self._root = Node(0, None, 0)
        self._named: WeakValueDictionary[tuple[int, int, Hashable], Node] = WeakValueDictionary()
        self._num_nodes = 0

    def path(
        self,
        prompt: Sequence[tuple[Hashable | None, int]],
        prompt_tokens: int,
        output_name: Hashable | None,
    ) -> list[Node]:
        """Nodes of a prompt followed by its output, by start.

        Names None belong to nobody else: their nodes are not found by other sequences.
        """
        if not prompt and output_name is None:
            return [self._new(0, self._root)]
        node, start, private = self._root, 0, False
        path: list[Node] = []
        segments = prompt or ((None, prompt_tokens),)
        for name, length in (*segments, (output_name, 1)):
            if length and not (private and name is None):
                private = name is None
                node = self._child(node, start, name)
                path.append(node)
            start += length
        return path

    def _child(self, parent: Node, start: int, name: Hashable | None) -> Node:
        if name is None:
            return self._new(start, parent)
        key = parent.serial, start, name
        child = self._named.get(key)
        if child is None:
            child = self._named[key] = self._new(start, parent)
        return child

    def _new(self, start: int, parent: Node) -> Node:
        self._num_nodes += 1
        return Node(start, parent, self._num_nodes)
