"""What the passes find: small frozen records, in the order in which they are filled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, fx

from squat_fx.codecs import Format, Role
from squat_fx.layouts.rotary import Rotation
from squat_fx.lenses import Join
from squat_fx.passes.spelling import sizes_of

if TYPE_CHECKING:
    from squat_fx.config import Config


@dataclass(frozen=True)
class Term:
    """What else than the product of queries and keys decides about the scores.

    Attributes:
        node: broadcastable to ``[batch, heads, queries, keys]``; leading dims may be missing.
        means: ``"add"`` (``factor * node`` is added), ``"attend"`` or ``"hide"`` (bool: True where
            a query attends, or does not).
        merged: whether its leading dim of three is batch and heads in one.
    """

    node: fx.Node
    means: Literal["add", "attend", "hide"] = "add"
    factor: float = 1.0
    merged: bool = False


@dataclass(frozen=True)
class Attention:
    """One attention, whichever way the model wrote it.

    ``output = softmax(softcap(scale * query @ key.T) + mask + terms) @ value`` per query head, with
    logits ``sinks`` in the normalisation. ``mask`` is the term next to the softmax if that is added
    as it is or says where to attend. ``causal`` is one of ``reference.NO_CAUSALITY``, ``TOP_LEFT``
    (torch's ``is_causal``), ``BOTTOM_RIGHT``. ``key`` and ``value`` are the nodes the attention
    reads, head repeats and transposes included.
    """

    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    mask: fx.Node | None = None
    causal: int = 0
    softcap: float = 0.0
    sinks: fx.Node | None = None
    spelling: str = "sdpa"
    terms: tuple[Term, ...] = ()


def usual_order(sizes: tuple[Any, ...], token_dim: int) -> tuple[Any, Any, Any, Any]:
    """Sizes of a cache, whose tokens are dim 1 or 2, as batch, heads, tokens and channels."""
    batch, first, second, channels = sizes
    return (batch, first, second, channels) if token_dim == 2 else (batch, second, first, channels)


@dataclass(frozen=True)
class CacheEdge:
    """Where one role of a layer's cache passes through the graph.

    ``stored`` is the node returned to the caller: ``grown``, which is ``cat(past, new)``, or only
    its newest tokens. In a ``decode`` edge ``past`` is a carrier; in a ``prefill`` edge there is
    nothing packed yet; in a ``read`` edge nothing is new, and ``stored`` is the carrier. What comes
    from elsewhere than the query does not grow afterwards. ``given`` is what the layout of ``fmt``
    is given: numbers, or where they come from in this graph. ``token_dim`` is the dim of tokens in
    all these nodes: 2, or 1 where heads come after them.
    """

    role: Role
    kind: Literal["prefill", "decode", "read"]
    stored: fx.Node
    new: fx.Node
    past: fx.Node | None
    fmt: Format
    given: Tensor | fx.Node | None = field(default=None, compare=False, repr=False)
    grown: fx.Node | None = None
    grows: bool = True
    token_dim: int = 2

    def sizes(self, node: fx.Node) -> tuple[Any, Any, Any, Any]:
        """Batch, heads, tokens and channels of ``stored``, ``new`` or another such node."""
        return usual_order(sizes_of(node), self.token_dim)

    @property
    def constant(self) -> Tensor | None:
        """What the layout is given, if that are numbers."""
        return self.given if isinstance(self.given, Tensor) else None

    @property
    def is_window(self) -> bool:
        """Whether only the newest tokens go back to the caller."""
        return self.grown is not None and self.grown is not self.stored

    @property
    def carrier(self) -> fx.Node:
        """The carrier of a ``decode`` edge."""
        assert self.past is not None, f"{self.kind} edge {self.stored} has no past"
        return self.past


@dataclass(frozen=True)
class AttentionSite:
    """One attention over past and new keys and values that will be rewritten.

    ``seen`` are the keys that it reads, if those are not all of ``cat(past, new)`` but the newest.
    Query heads of one KV head follow each other, unless they are ``tiled``: then query head ``i``
    reads KV head ``i % num_kv_heads``. An attention whose heads read caches in different order has
    several sites, each for some of its query ``heads``: the first one and how many.
    """

    attention: Attention
    key: CacheEdge
    value: CacheEdge
    num_queries_per_kv: int
    layer: int
    seen: fx.Node | None = None
    tiled: bool = False
    heads: tuple[int, int] | None = None

    @property
    def kind(self) -> str:
        """``"prefill"``, ``"decode"`` or ``"read"``."""
        return self.key.kind


@dataclass(frozen=True)
class Angles:
    """The angles behind the ``cos`` and ``sin`` of a :class:`Rotary`, one for each pair.

    ``cos = scaling * cos(node)`` and ``sin = scaling * sin(node)``, and where the two are found,
    ``node = positions * inv_freq``: one number a token and one a pair. ``dims`` are the dims of
    ``node`` that are batch, heads, tokens and pairs; None where it is the same for all.
    """

    node: fx.Node
    dims: tuple[int | None, ...]
    scaling: float
    positions: fx.Node | None = None
    inv_freq: fx.Node | None = None


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding between a key and the cache.

    With each node's tensor in its place, and ``rearranged`` of ``layouts.rotary``::

        rotated = rotation.apply(
            rearranged(key, key_dims), rearranged(cos, cos_dims), rearranged(sin, cos_dims)
        )

    Attributes:
        rotated: the key that is concatenated to the past, ``[batch, heads, tokens, head_dim]``.
        key: the key before the rotation, after any norm.
        key_dims: the order in which ``key``'s dims are batch, heads, tokens and channels.
        cos, sin: what the pairs turn by, any scaling included; a number for each of ``rotary_dim``
            channels or for each pair.
        cos_dims: the dims of ``cos`` and of ``sin`` that are batch, heads, tokens and channels;
            None where they are the same for all.
        rotation: which channels are pairs.
        angles: what ``cos`` and ``sin`` were computed from, if that is in the graph.
    """

    rotated: fx.Node
    key: fx.Node
    key_dims: tuple[int, ...]
    cos: fx.Node
    sin: fx.Node
    cos_dims: tuple[int | None, ...]
    rotation: Rotation
    angles: Angles | None = None


@dataclass(frozen=True)
class Block:
    """Some of an attention's query heads, the first one and how many, and the keys and values that
    they read, each group of them a KV head.
    """

    heads: tuple[int, int]
    key: fx.Node
    value: fx.Node


@dataclass(frozen=True)
class JoinedOutput:
    """A flat output that is put together from caches.

    ``first`` is which output of the graph is the first of them, ``whole`` the node that was
    returned before.
    """

    first: int
    join: Join
    whole: fx.Node


@dataclass(frozen=True)
class Skipped:
    """An attention that runs as it was, and why; ``reason`` is a sentence for the user."""

    node: str
    reason: str
    layer: int | None = None


@dataclass
class Rewriting:
    """One graph on its way through the pipeline.

    Attributes:
        module: the copied graph module, changed in place.
        carriers: placeholders that arrive as ``QuantizedKV``, with their stored format (None: the
            config decides).
        attentions, sites, skipped, notes: what the passes found.
        lone_edges: carriers that grow although no attention over them was understood.
        inputs: what feeds the rewritten graph's placeholders, filled by ``quantize_kv_cache``.
        outputs: how each flat output is made, likewise.
        rows: what the rows of the positions tensor say: carriers, and numbers besides. Where a
            window begins stands behind its carriers: a layer's rows are together.
        make_positions: gives a row's node, and for -1 the placeholder of the whole tensor.
        placeholders: the original graph's inputs.
        constants: placeholders that are always fed the same tensor.
        watched: the layers whose errors are the last output of the rewritten graph.
        due: int64 of no dims, on the CPU: whether a call is to measure them, or return zeros.
        is_replayed: whether the graph is to be replayed as a CUDA graph, if that is possible.
        beside: what is computed before the graph is called.
        joined: inputs that hold several caches, with how; None if they may do so in later calls.
        taken_apart: the placeholders for the caches in such an input; behind all others.
        returned_as: which output of the graph each flat output is, or is put together from; empty
            if that is as it was.
        made: the nodes that taking apart put into the graph.
        blocks: attentions, by their outputs, whose query heads read caches in different order.
        replaced: what reads a part of a joined tensor, the part as it was and as it is now.
    """

    module: fx.GraphModule
    config: Config
    carriers: dict[fx.Node, Format | None]
    attentions: list[Attention] = field(default_factory=list)
    sites: list[AttentionSite] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lone_edges: list[CacheEdge] = field(default_factory=list)
    inputs: list[InnerInput] = field(default_factory=list)
    outputs: list[InnerOutput] = field(default_factory=list)
    rows: list[fx.Node | Number] = field(default_factory=list)
    make_positions: Callable[[int], Any] | None = None
    placeholders: tuple[fx.Node, ...] = ()
    constants: dict[fx.Node, Tensor] = field(default_factory=dict)
    watched: tuple[int, ...] = ()
    due: Tensor | None = None
    is_replayed: bool = False
    beside: Beside | None = None
    joined: dict[fx.Node, Join | None] = field(default_factory=dict)
    taken_apart: dict[fx.Node, tuple[fx.Node, ...]] = field(default_factory=dict)
    returned_as: list[int | JoinedOutput] = field(default_factory=list)
    blocks: dict[fx.Node, list[Block]] = field(default_factory=dict)
    made: list[fx.Node] = field(default_factory=list)
    replaced: list[tuple[fx.Node, fx.Node, fx.Node]] = field(default_factory=list)

    @property
    def graph(self) -> fx.Graph:
        """The graph being rewritten."""
        return self.module.graph

    def positions(self) -> fx.Node:
        """The placeholder of the positions tensor, made on first use."""
        assert self.make_positions is not None
        return self.make_positions(-1)

    @property
    def handles(self) -> list[fx.Node]:
        """The carriers, in the order of their rows."""
        return [row for row in self.rows if isinstance(row, fx.Node)]

    @property
    def numbers(self) -> list[tuple[int, Number]]:
        """The other rows, and what they say."""
        return [(i, row) for i, row in enumerate(self.rows) if isinstance(row, Number)]

    def row_of(self, what: fx.Node | Number) -> int:
        """The row of a carrier or a number, which is made on first use."""
        if what not in self.rows:
            self.rows.append(what)
        return self.rows.index(what)

    def window_of(self, site: AttentionSite) -> Number | None:
        """Where what a site sees begins; None if it sees all of the past."""
        if site.kind != "decode" or site.key.carrier not in self.windows():
            return None
        seen = site.seen or site.key.grown or site.key.stored
        past = site.key.sizes(seen)[2] - site.key.sizes(site.key.new)[2]
        return Number(past, (site.key.carrier, site.value.carrier))

    def windows(self) -> set[fx.Node]:
        """Carriers of which a graph sees, or keeps, the newest tokens only."""
        found: set[fx.Node] = set()
        for site in self.sites:
            if site.kind == "decode" and (site.key.is_window or site.seen is not None):
                found |= {site.key.carrier, site.value.carrier}
        lone = (e for e in self.lone_edges if e.is_window)
        return found | {edge.carrier for edge in lone}

    def edges(self) -> dict[fx.Node, CacheEdge]:
        """All cache edges by the node that is returned."""
        found = {edge.stored: edge for site in self.sites for edge in (site.key, site.value)}
        return found | {edge.stored: edge for edge in self.lone_edges}


@dataclass(frozen=True)
class Number:
    """A number that the boundary tells the graph, as the first one of a row of positions.

    ``size`` is an expression over the sizes of the inputs. With ``carriers``, keys and values of a
    layer, it is the first of their tokens that is seen when the ``size`` newest are.
    """

    size: Any
    carriers: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class InnerInput:
    """What one placeholder of the inner graph is fed with.

    ``kind`` is ``"argument"`` (argument ``index`` as it is), ``"dense"`` (the same, dequantized),
    ``"arena"`` (arena ``name`` of carrier ``index``), ``"positions"``, ``"constant"`` (``tensor``)
    or ``"beside"`` (output ``index`` of the graph beside it).
    """

    kind: Literal["argument", "dense", "arena", "positions", "constant", "beside"]
    index: int = -1
    name: str = ""
    tensor: Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Beside:
    """A graph that is called before another one, to which it gives its outputs.

    Attributes:
        module: takes what ``inputs`` say, and returns a tuple of tensors.
        inputs: what feeds it.
        grow: of each output, whether its last dim grows with the cache; then it may be given with
            more columns, which nobody reads.
    """

    module: fx.GraphModule
    inputs: tuple[InnerInput, ...]
    grow: tuple[bool, ...]


@dataclass(frozen=True)
class InnerOutput:
    """How one flat output of the compiled callable is made from the inner graph's outputs.

    ``kind`` is ``"value"`` (inner output ``first``), ``"appended"`` (the carrier argument
    ``argument``, longer by ``tokens``, of which the newest ``kept`` go on), ``"stored"`` (``count``
    arenas from inner output ``first``, holding ``tokens`` tokens), ``"argument"`` (argument
    ``argument`` as it is) or ``"number"`` (``tokens``).
    """

    kind: Literal["value", "appended", "stored", "argument", "number"]
    first: int = -1
    count: int = 0
    argument: int = -1
    tokens: Any = 0
    edge: CacheEdge | None = None
    kept: Any = None
