"""What rank 0 and the other ranks say to each other, as msgpack in the frames of a channel.

Both ends run the same version, which is the first thing they compare. Anything that does not decode to one of these
messages raises ChannelError: there is no partial understanding, and nothing in a message is ever run.
"""

from __future__ import annotations

import msgspec

from millpond.engine.group import RankReport
from millpond.engine.orders import Offered, Order
from millpond.parallel.channel import ChannelError
from millpond.wire import UNDECODABLE, Start

# --- rank 0 → the others ----------------------------------------------------------------------------------------


class Setup(msgspec.Struct, frozen=True, tag=True):
    """Be part of this."""

    start: Start
    neighbours: int
    """Ranks on the machine of the one that is told."""


class Go(msgspec.Struct, frozen=True, tag=True):
    """Everybody is here and has the same model: open the connections that tensors travel on."""


class VoteResult(msgspec.Struct, frozen=True, tag=True):
    """Whether all ranks have voted yes."""

    unanimous: bool


class Settled(msgspec.Struct, frozen=True, tag=True):
    """What all of them can do."""

    found: RankReport


class Told(msgspec.Struct, frozen=True, tag=True):
    """Do this next. Numbers rise by one."""

    number: int
    order: Order


# --- the others → rank 0 ----------------------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag=True):
    """Who is there."""

    rank: int
    world: int
    backend: str
    machine: str
    """Equal for ranks on one machine."""
    versions: dict[str, str]
    flags: dict[str, str] = {}
    """See GroupSettings."""


class Content(msgspec.Struct, frozen=True, tag=True):
    """Digest of the weights and the config of the model that this rank has found."""

    digest: str


class Vote(msgspec.Struct, frozen=True, tag=True):
    """Yes or no."""

    yes: bool


class Reported(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded, and this is what it can do."""

    found: RankReport


class Restorable(msgspec.Struct, frozen=True, tag=True):
    """The answer to a Begin: so many tokens can be, or now are, restored."""

    name: str
    position: int


class Done(msgspec.Struct, frozen=True, tag=True):
    """A forward has been read, and everything up to this order is done."""

    number: int


class Broken(msgspec.Struct, frozen=True, tag=True):
    """This rank cannot go on."""

    reason: str


# --- both ways --------------------------------------------------------------------------------------------------


class Alive(msgspec.Struct, frozen=True, tag=True):
    """Twice a second, whatever else is said."""


FromLeader = Setup | Go | VoteResult | Settled | Told | Broken | Alive
FromFollower = Hello | Content | Vote | Reported | Offered | Restorable | Done | Broken | Alive

_encoder = msgspec.msgpack.Encoder()
_from_leader: msgspec.msgpack.Decoder[FromLeader] = msgspec.msgpack.Decoder(FromLeader)
_from_follower: msgspec.msgpack.Decoder[FromFollower] = msgspec.msgpack.Decoder(FromFollower)


def encode(message: FromLeader | FromFollower) -> bytes:
    """A frame's body."""
    return _encoder.encode(message)


def decode_from_leader(body: bytes) -> FromLeader:
    """Raises ChannelError."""
    try:
        return _from_leader.decode(body)
    except UNDECODABLE as error:
        raise ChannelError(f"undecodable message from rank 0: {error}") from error


def decode_from_follower(body: bytes) -> FromFollower:
    """Raises ChannelError."""
    try:
        return _from_follower.decode(body)
    except UNDECODABLE as error:
        raise ChannelError(f"undecodable message to rank 0: {error}") from error
