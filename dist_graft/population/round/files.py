"""A round between jobs that share only a directory: publish, choose, blend (ADR 39).

Nothing here is a collective. `Grafter` calls these parts in order, and the replicas of a network
agree on every choice there.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_graft.grafting.mixing import blend_, blend_elementwise_
from dist_graft.grafting.rules.base import Rule
from dist_graft.grafting.units import GraftUnit, Lead
from dist_graft.population.round.agreement import Schema, rule_options
from dist_graft.population.round.apply_mixing import Applied
from dist_graft.population.round.file_choice import (
    Decided,
    Place,
    Published,
    needed_from,
    needs_step,
    upstream,
    usable,
)
from dist_graft.population.round.publications import (
    Publication,
    PublicationError,
    Publisher,
    network_folder,
    publication_path,
    published_networks,
    published_places,
)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.5
_WARN_AFTER_SECONDS = 30.0
_DIGEST_WORDS = 4  # int64
_log = logging.getLogger("dist_graft")


@dataclass(frozen=True, kw_only=True)
class JobState:
    """Position of a job at a round. Only the exchange "files" needs it."""

    place: Place
    lr: float | None = None
    """Learning rate, for the publication."""
    resume: Place | None = None
    """Where the job would resume from its latest checkpoint; None: unknown."""
    should_stop: Callable[[], bool] = lambda: False
    """Polled while the round waits for other networks."""


@dataclass(frozen=True)
class Choice:
    """Publications that a round uses, as the leader of the replicas chose them."""

    places: dict[int, Place]
    """By network."""
    digests: dict[int, str]

    @staticmethod
    def empty(networks: int) -> Tensor:
        """Return a tensor of the shape that `to_tensor` returns for so many networks."""
        return torch.zeros(networks, 3 + _DIGEST_WORDS, dtype=torch.int64)

    def to_tensor(self) -> Tensor:
        """Return one row for each network: number, epoch, step, digest; int64 [networks, 7]."""
        rows = [
            [network, place.epoch, place.step, *_words(self.digests[network])]
            for network, place in self.places.items()
        ]
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), 3 + _DIGEST_WORDS)

    @classmethod
    def from_tensor(cls, rows: Tensor, steps_per_epoch: int) -> Choice:
        """Restore what `to_tensor` returned."""
        places, digests = {}, {}
        for network, epoch, step, *words in rows.tolist():
            places[network] = Place(epoch, step, steps_per_epoch)
            digests[network] = "".join(f"{word & (2**64 - 1):016x}" for word in words)
        return cls(places, digests)

    def provenance(self, own: Place, donors: Sequence[int]) -> dict[str, Any]:
        """Fields of a GraftRecord: lag of each donor, epoch and digest of the first one."""
        if not donors:
            return {}
        return {
            "lags": {donor: own.lag_of(self.places[donor]) for donor in donors},
            "donor_epoch": self.places[donors[0]].epochs,
            "digest": self.digests[donors[0]],
        }


def _words(digest: str) -> list[int]:
    """A sha256 in hexadecimal as signed 64-bit integers."""
    size = len(digest) // _DIGEST_WORDS
    unsigned = [int(digest[start : start + size], 16) for start in range(0, len(digest), size)]
    return [word - 2**64 if word >= 2**63 else word for word in unsigned]


class FilesRound:
    """Publications of a population in a shared directory, as seen by one network.

    Args:
        directory: shared by all networks; publications are in its folder `exchange`.
        network: number of this network.
        networks: size of the population. Networks that joined later are found, except with max_lag
            0.
        rule: decides which networks a round needs.
        max_lag: largest distance between two networks in epochs, ahead or behind; 0: only
            publications of the same place.
        wait_seconds: how long a round waits for the networks it needs; may be infinite.

    Raises: ValueError naming an option that is out of range, or for a rule that needs all
        networks at the same step.
    """

    def __init__(
        self,
        directory: Path,
        network: int,
        networks: int,
        rule: Rule,
        *,
        max_lag: float,
        wait_seconds: float,
    ) -> None:
        if not 0 <= network < networks:
            raise ValueError(f"network must be in 0 to {networks - 1}, got {network!r}")
        if not (max_lag >= 0 and math.isfinite(max_lag)):
            raise ValueError(f"max_lag must be at least 0, got {max_lag!r}")
        if not wait_seconds >= 0:
            raise ValueError(f"wait_seconds must be at least 0, got {wait_seconds!r}")
        if getattr(rule, "synchronous", False):  # a rule of the user may be any class
            raise ValueError(needs_step(rule))
        self.network = network
        self.networks = networks
        self._exchange = directory / "exchange"
        self._max_lag = max_lag
        self.wait_seconds = wait_seconds
        """How long a round waits for the networks it needs."""
        self.only_donor = getattr(rule, "needs_only_donor", False) and max_lag > 0
        """Whether the nearest network upstream suffices."""
        self._publisher = Publisher(network_folder(self._exchange, network), keep_all=self.lockstep)
        self._first = True
        self._needed_from: Place | None = Place(0) if self.lockstep else None
        self._damaged: dict[Path, tuple[int, ...]] = {}

    @property
    def lockstep(self) -> bool:
        """Whether only publications of the same place are used (max_lag 0)."""
        return self._max_lag == 0

    def publish(self, published: Published, copied: Mapping[str, Tensor]) -> None:
        """Start writing this network's publication.

        Args:
            published: description of the network.
            copied: its tensors in host memory, which are not changed afterwards.
        """
        if self._first and not self.lockstep:
            self._publisher.discard_after(published.place)
        self._first = False
        if not published.diverged:
            self._publisher.publish(published, copied, self._needed_from)
        elif self.lockstep:  # the others wait for this network: publish that it has no weights
            self._publisher.publish(published, {}, self._needed_from)

    def flush(self) -> None:
        """Wait until everything is written, or cannot be written."""
        self._publisher.flush()

    def search(self, own: Published, tensors: Mapping[str, Tensor]) -> Search:
        """Start the search for the publications of a round."""
        return Search(self, own, tensors)

    def farthest(self, own: Published, tensors: Mapping[str, Tensor]) -> Publication | None:
        """Open the publication of the network that has trained farthest; None without any."""
        candidates = [
            (place, other)
            for other in self.others()
            for place in published_places(
                network_folder(self._exchange, other), own.place.steps_per_epoch
            )
        ]
        for place, other in sorted(candidates, key=lambda found: found[0], reverse=True):
            if publication := self.open(other, place, own, tensors):
                return publication
        return None

    def end_round(self, search: Search) -> None:
        """Close the files, and note which publications the networks may still need."""
        resume = {other: found.published.resume for other, found in search.found.items()}
        resume[self.network] = search.own.resume
        if self.lockstep:
            self._needed_from = needed_from(resume, range(self.networks))
        search.close()

    def others(self) -> list[int]:
        """The other networks that exist or are expected, the ring's donor first."""
        known = set(range(self.networks))
        if not self.lockstep:
            known |= set(published_networks(self._exchange))
        return upstream(self.network, sorted({*known, self.network}))

    def awaited(self) -> set[int]:
        """Networks that a round waits for."""
        others = [other for other in self.others() if other < self.networks]
        return set(others[:1] if self.only_donor else others)

    def newest(
        self, network: int, own: Published, tensors: Mapping[str, Tensor]
    ) -> Publication | None:
        """Open the newest usable publication of a network; None if there is none.

        Files that cannot be used are skipped with a warning.
        """
        folder = network_folder(self._exchange, network)
        if self.lockstep:
            places = [own.place] if publication_path(folder, own.place).exists() else []
        else:
            places = usable(
                own.place, published_places(folder, own.place.steps_per_epoch), self._max_lag
            )
        for place in places:
            if publication := self.open(network, place, own, tensors):
                return publication
        return None

    def open(
        self, network: int, place: Place, own: Published, tensors: Mapping[str, Tensor]
    ) -> Publication | None:
        """Open and check one publication; None, with a warning, if it cannot be used."""
        path = publication_path(network_folder(self._exchange, network), place)
        if self._damaged.get(path) == _signature(path):
            return None
        try:
            publication = Publication(path)
        except PublicationError as error:
            self.reject(path, str(error))
            return None
        found = publication.published
        try:
            if found.schema != own.schema:
                raise PublicationError("it is of another model or rule")
            if (found.network, found.place) != (network, place):
                raise PublicationError(
                    f"it is of network {found.network} at epoch {found.place.epochs:g}"
                )
            if found.diverged and not self.lockstep:
                raise PublicationError(f"its network has {found.diverged}")
            publication.check_tensors(tensors)
        except PublicationError as error:
            publication.close()
            self.reject(path, str(error))
            return None
        return publication

    def reject(self, path: Path, reason: str) -> None:
        """Warn of a publication that cannot be used, once, and ignore it from now on."""
        signature = _signature(path)
        if signature and self._damaged.get(path) != signature:
            _log.warning("%s is skipped: %s; training continues", path, reason)
            self._damaged[path] = signature


class Search:
    """Search for the publications of one round.

    Args:
        files: publications of the population.
        own: description of this network.
        tensors: this network's tensors, which all networks must have.
    """

    def __init__(self, files: FilesRound, own: Published, tensors: Mapping[str, Tensor]) -> None:
        self._files = files
        self.own = own
        self._tensors = tensors
        self._start = time.monotonic()
        self._pause = _FIRST_PAUSE
        self._has_warned = False
        self._excluded: set[int] = set()
        self.found: dict[int, Publication] = {}
        """Open publications by network."""

    def poll(self, seconds: float) -> Choice | None:
        """Look for publications; None if some are still awaited after so many seconds."""
        until = time.monotonic() + seconds
        while True:
            missing = self._look()
            now = time.monotonic()
            waited = now - self._start
            if not missing or waited >= self._files.wait_seconds:
                return self._choice()
            self._warn(missing, waited)
            left = min(until - now, self._files.wait_seconds - waited)
            if left <= 0:
                return None
            time.sleep(min(self._pause, left))
            self._pause = min(1.5 * self._pause, _LONGEST_PAUSE)

    def open(self, choice: Choice) -> set[int]:
        """Open the chosen publications that are not open yet; returns those that fail."""
        failed = set()
        for network, place in choice.places.items():
            publication = self.found.get(network) or self._files.open(
                network, place, self.own, self._tensors
            )
            if publication is None:
                failed.add(network)
                continue
            self.found[network] = publication
            if publication.published.digest != choice.digests[network]:  # replaced meanwhile
                failed.add(network)
        return failed

    def farthest(self) -> Choice:
        """Choose the network that has trained farthest; an empty choice if there is none."""
        publication = self._files.farthest(self.own, self._tensors)
        if publication:
            self.found[publication.published.network] = publication
        return self._choice()

    def copy(self, tensors: Mapping[str, Tensor], choice: Choice) -> set[int]:
        """Copy the chosen network's tensors in place; returns it if its file fails."""
        try:
            for network in choice.places:
                for key, tensor in tensors.items():
                    tensor.detach().copy_(_read(self.found, network, key, tensor))
        except DonorError as error:
            return {error.network}
        return set()

    def blend(
        self, tensors: Mapping[str, Tensor], units: Sequence[GraftUnit], decided: Decided
    ) -> tuple[Applied, set[int]]:
        """Blend the donors into this network in place; see `blend_publications`.

        Returns: measurements, and the network whose file failed, if any; it is skipped with a
            warning from now on, and some tensors may have been changed.
        """
        try:
            return blend_publications(tensors, units, decided, self.found), set()
        except DonorError as error:
            self._files.reject(self.found[error.network].path, str(error))
            return Applied([], 0), {error.network}

    def drop(self, networks: Collection[int]) -> None:
        """Close publications that failed in some replica.

        The round continues without these networks, or waits for them with max_lag 0.
        """
        if self._files.lockstep:
            time.sleep(self._pause)
        else:
            self._excluded |= set(networks)
        self._close(networks)

    def close(self) -> None:
        """Close all files."""
        self._close(list(self.found))

    def _close(self, networks: Collection[int]) -> None:
        for network in networks:
            if publication := self.found.pop(network, None):
                publication.close()

    def _look(self) -> set[int]:
        """Open what is present; returns the networks that are missing."""
        awaited = self._files.awaited() if self._files.wait_seconds else set()
        for other in self._files.others():
            if other in self._excluded:
                continue
            if other not in self.found and (
                publication := self._files.newest(other, self.own, self._tensors)
            ):
                self.found[other] = publication
            if self._files.only_donor and other in self.found:
                break
        return awaited - set(self.found) - self._excluded

    def _choice(self) -> Choice:
        return Choice(
            {network: found.published.place for network, found in self.found.items()},
            {network: found.published.digest for network, found in self.found.items()},
        )

    def _warn(self, missing: set[int], waited: float) -> None:
        if waited >= _WARN_AFTER_SECONDS and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "round %d: waiting for network %s at epoch %g for %.0f s (graft.wait_seconds)",
                self.own.round,
                ", ".join(map(str, sorted(missing))),
                self.own.place.epochs,
                waited,
            )


class DonorError(Exception):
    """A donor's publication failed during a blend. Some tensors were changed."""

    def __init__(self, network: int, reason: str) -> None:
        super().__init__(reason)
        self.network = network


def blend_publications(
    tensors: Mapping[str, Tensor],
    units: Sequence[GraftUnit],
    decided: Decided,
    publications: Mapping[int, Publication],
) -> Applied:
    """Blend the donors' publications into this network, tensor by tensor, in place.

    Holds one tensor of one donor at a time.

    Args:
        tensors: this network's tensors by state-dict key; changed in place.
        units: graft units of the common architecture.
        decided: shares of the networks that are present.
        publications: open publications by network.

    Raises: DonorError when a publication is damaged or vanishes; some tensors were changed then.
    """
    mixing, row, present = decided.mixing, decided.row, decided.present
    donors = mixing.donors[row]
    fractions = dict(zip(donors, mixing.fractions(row), strict=True))
    squares: list[Tensor] = []
    received = 0
    for number, unit in enumerate(units):
        parts = [torch.zeros((), dtype=torch.float64)]
        for key in unit.tensors:
            tensor = tensors[key].detach()
            # All distances are measured before the first blend.
            for donor in donors:
                part = _read(publications, present[donor], key, tensor)
                parts.append(_squared_distance(tensor, part))
                received += part.numel() * part.element_size()
            for donor in donors:
                if len(donors) > 1:  # read again, to hold one tensor at a time
                    part = _read(publications, present[donor], key, tensor)
                fraction = mixing.tensor_fraction(
                    row, donor, number, key, tensor.shape, buffer=key in unit.buffers
                )
                if fraction is None:
                    blend_([tensor], [part], [fractions[donor][number]])
                else:
                    blend_elementwise_(tensor, part, fraction.expand(tensor.shape))
        squares.append(torch.stack([part.to(parts[-1].device) for part in parts]).sum())
    means = torch.stack(squares).tolist()
    return Applied([math.sqrt(total / max(1, len(donors))) for total in means], received)


def _read(publications: Mapping[int, Publication], network: int, key: str, like: Tensor) -> Tensor:
    """One tensor of a publication, on the device and in the memory format of `like`."""
    try:
        content = publications[network].read(key)
    except PublicationError as error:
        raise DonorError(network, str(error)) from error
    if like.device.type == "cpu" and like.is_contiguous():
        return content
    return torch.empty_like(like).copy_(content)


def _squared_distance(one: Tensor, other: Tensor) -> Tensor:
    dtype = torch.promote_types(one.dtype, torch.float32)
    return torch.dist(one.to(dtype), other.to(dtype)).double().square()


def schema_digest(
    tensors: Mapping[str, Tensor], units: Sequence[GraftUnit], rule: Rule, lead: Lead
) -> str:
    """Digest of what the networks of a population must have in common to blend."""
    formats = {
        key: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for key, tensor in tensors.items()
    }
    schema = Schema(formats, [unit.name for unit in units], rule_options(rule) | {"lead": lead})
    return f"{schema.digest:016x}"


@torch.no_grad()
def copy_to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to host memory, in their memory format."""
    return {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}


@torch.no_grad()
def undo_blend(tensors: Mapping[str, Tensor], copied: Mapping[str, Tensor]) -> None:
    """Undo a blend in place."""
    for key, tensor in tensors.items():
        tensor.copy_(copied[key])


def _signature(path: Path) -> tuple[int, ...]:
    """Identity of a file's content; empty if there is no file."""
    try:
        status = os.stat(path)  # noqa: PTH116  as fast as possible
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns
