"""SwAV cluster-swap over modalities and views: each predicts the codes of the others."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrep.errors import ConfigError, LossError, check_choice
from mmrep.losses.base import Loss, LossOutput, connected_zero, fp32
from mmrep.losses.checks import Embeddings, Presence, check_modalities, refuse_not_finite
from mmrep.losses.prototype_usage import PrototypeUsage
from mmrep.losses.prototypes import SHARED, FeatureQueue, PrototypeBank, View, view_names
from mmrep.losses.weights import Matrix, check_matrix, weight_between
from mmrep.ops.gather import gather_rows, rank, sum_over_ranks, world_size
from mmrep.ops.multilinear import in_fp32
from mmrep.ops.sinkhorn import sinkhorn

PAIRS = ("all", "cross", "intra")
PROTOTYPES = ("shared", "per_modality")
CODES = ("own", "product", "mean")
MARGINALS = ("view", "modality", "union")
TIE = 1e-3
"""Codes that differ by less, relatively, are equal when they are rounded to one prototype."""


class ClusterSwapLoss(Loss):
    r"""Swapped prediction of cluster assignments (SwAV: Caron et al. 2020), between any number of modalities and views.

    For views a = (modality, view) with rows z_a and prototypes C, codes ``q_a = Sinkhorn(z_a C^T / eps)`` without gradient,
    over the rows of all ranks (equation 3), and ``l(a -> b) = -sum_n sum_k q_a[n,k] log softmax(z_b C^T / T)[n,k] / n_ab``
    over the n_ab samples that have both (equation 2). With the assigning views A and weights w,
    ``L = 1/|A| sum_{a in A} ( sum_{b != a} w_ab l(a -> b) / sum_{b != a} w_ab )``. One modality is SwAV; two with a view each
    and shared prototypes are MGCA's term (Wang et al. 2022).

    Args:
        modalities: Which there are.
        embed_dim: Width of the rows, which should have length 1.
        num_prototypes: K, about ten times the classes that one hopes for; a list gives several sets (heads), and the mean.
        prototypes: ``shared``, or ``per_modality``: then a's codes live on a's prototypes, and b predicts them there.
        pairs: Which views predict a view's codes: ``all`` others, ``cross``: those of other modalities, ``intra``: those of its
            own, or M x M weights from row (assigns) to column (predicts). By default ``cross``, and ``all`` for one modality.
        teacher_views: The first so many views of each modality assign codes: with multi-crop, the global ones. None: all.
        temperature: T.
        epsilon: Smoothness of the codes.
        iterations: Of Sinkhorn-Knopp.
        codes: ``own``; ``product``: from the summed scores of all modalities of a view (SeLaVi); ``mean``: from their mean row
            (MCN). Both need shared prototypes.
        marginals: Over what every prototype gets its equal share: each ``view``; all views of a ``modality``; the ``union``
            of all, which rewards modalities that keep apart.
        queue_length: Features per assigning view that take part in Sinkhorn, for batches that are small against K. Used once
            full; needs ``teacher_views``.
        queue_start: Steps before the queue is used. A step here is a forward pass in training: with gradients accumulated
            over k batches there are k of them for each of the optimiser's.
        freeze_steps: Steps in which prototypes stand still, while random features would move them.
        hard_steps: Steps with codes rounded to one prototype.
    """

    step: Tensor

    def __init__(
        self,
        *,
        modalities: Sequence[str],
        embed_dim: int,
        num_prototypes: int | list[int] = 300,
        prototypes: str = "shared",
        pairs: str | Matrix | None = None,
        teacher_views: int | None = None,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        codes: str = "own",
        marginals: str = "view",
        queue_length: int = 0,
        queue_start: int = 0,
        freeze_steps: int = 0,
        hard_steps: int = 0,
    ) -> None:
        check_modalities(modalities, at_least=1)
        pairs = pairs if pairs is not None else "all" if len(modalities) == 1 else "cross"
        check_choice("prototypes", prototypes, PROTOTYPES)
        check_choice("codes", codes, CODES)
        check_choice("marginals", marginals, MARGINALS)
        _check_pairs(pairs, modalities)
        if prototypes != "shared" and (codes != "own" or marginals == "union"):
            raise ConfigError(f"codes={codes!r} with marginals={marginals!r} needs prototypes='shared'")
        if iterations < 1 or not (temperature > 0 and epsilon > 0):
            raise ConfigError(
                f"iterations={iterations} must be at least 1, temperature={temperature} and epsilon={epsilon} positive"
            )
        numbers = {"queue_length": queue_length, "queue_start": queue_start}
        numbers |= {"freeze_steps": freeze_steps, "hard_steps": hard_steps}
        if min(numbers.values()) < 0 or (teacher_views is not None and teacher_views < 1):
            raise ConfigError(f"{numbers} must not be negative, teacher_views={teacher_views} at least 1")
        if queue_length and teacher_views is None:
            raise ConfigError("queue_length needs teacher_views", fix="say how many views of a modality assign codes")
        super().__init__(
            modalities=modalities,
            embed_dim=embed_dim,
            num_prototypes=num_prototypes,
            prototypes=prototypes,
            pairs=pairs,
            teacher_views=teacher_views,
            temperature=temperature,
            epsilon=epsilon,
            iterations=iterations,
            codes=codes,
            marginals=marginals,
            queue_length=queue_length,
            queue_start=queue_start,
            freeze_steps=freeze_steps,
            hard_steps=hard_steps,
        )
        self.names, self.pairs, self.teacher_views = list(modalities), pairs, teacher_views
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations
        self.codes, self.marginals = codes, marginals
        self.queue_start, self.freeze_steps, self.hard_steps = queue_start, freeze_steps, hard_steps
        counts = [num_prototypes] if isinstance(num_prototypes, int) else list(num_prototypes)
        self.bank = PrototypeBank(self.names if prototypes == "per_modality" else (), counts, embed_dim)
        self.queue = (
            FeatureQueue(view_names(self.names, teacher_views), queue_length, embed_dim)
            if queue_length and teacher_views is not None
            else None
        )
        self.register_buffer("step", torch.tensor(0))
        self.usage = PrototypeUsage(self.bank)

    @fp32
    def forward(self, embeddings: Embeddings, present: Presence | None = None) -> LossOutput:
        """See `Loss`. In evaluation there is no queue, and a batch with a single view has no term.

        Raises:
            LossError: On unknown modalities, shapes that do not fit, NaN, infinity, a batch longer than the queue, or a single
                view in training.
        """
        self.check(embeddings, present, at_least=1)
        views = _views(embeddings, present)
        teachers = [view for view in views if self.teacher_views is None or view.number < self.teacher_views]
        weights = [[self._weight(teacher, view) for view in views] for teacher in teachers]
        zero, step = connected_zero([*embeddings.values(), *self.parameters()]), int(self.step)
        if not any(weight for row in weights for weight in row):
            if self.training:
                raise LossError(
                    f"{[view.name for view in views]}: no view predicts another", fix="give the encoder crops or views"
                )
            return LossOutput(zero)
        if self.training and step >= self.freeze_steps:
            self.bank.normalize_()
        together = _count_pairs(teachers, views)
        assigning = self._assigning(teachers)
        heads = [self._head(head, views, teachers, assigning, together, step) for head in range(len(self.bank.counts))]
        terms = torch.stack([terms for terms, _ in heads]).mean(dim=0)
        share = terms.new_tensor(weights)
        share = share / share.sum(dim=1, keepdim=True).clamp(min=1e-12) / share.any(dim=1).sum()
        if self.training:
            self._push(assigning)
            self.step += 1
        parts = _by_modality(terms.detach(), together, weights, teachers, views)
        metrics = {name: torch.stack([m[name] for _, m in heads]).mean() for name in heads[0][1]}
        return LossOutput(zero + (share * terms).sum(), parts, metrics)

    def not_decayed(self) -> list[Tensor]:
        """The prototypes, which are brought back to length 1 anyway."""
        return list(self.bank.parameters())

    def before_optimizer_step(self) -> None:
        """Freezes the prototypes for the first steps: see `PrototypeBank.drop_gradients`."""
        if int(self.step) <= self.freeze_steps:
            self.bank.drop_gradients()

    def _weight(self, teacher: View, view: View) -> float:
        if teacher.name == view.name:
            return 0.0
        same = teacher.modality == view.modality
        if isinstance(self.pairs, str):
            return float({"all": True, "cross": not same, "intra": same}[self.pairs])
        return weight_between(self.pairs, self.names, teacher.modality, view.modality)

    @torch.no_grad()
    def _assigning(self, teachers: Sequence[View]) -> list[View]:
        """The rows by which each teacher's codes are made: its own, or a joint one of all modalities at its view number.

        Scores are linear in the rows, so that the product of the modalities' softmaxes is that of their summed rows.
        """
        if self.codes == "own":
            return [View(t.modality, t.number, t.rows.detach(), t.valid) for t in teachers]
        joint = {}
        for number in {teacher.number for teacher in teachers}:
            views = [teacher for teacher in teachers if teacher.number == number]
            rows = torch.stack([view.rows * view.valid[:, None] for view in views]).sum(dim=0)
            rows = F.normalize(rows, dim=1) if self.codes == "mean" else rows
            joint[number] = (rows, torch.stack([view.valid for view in views]).any(dim=0))
        return [View(t.modality, t.number, *joint[t.number]) for t in teachers]

    def _head(
        self,
        head: int,
        views: list[View],
        teachers: list[View],
        assigning: list[View],
        together: Tensor,
        step: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms ``l(a -> b)`` ``[A, V]`` on one set of prototypes, and what is worth a curve."""
        banks = {teacher.modality: self.bank(teacher.modality, head) / self.temperature for teacher in teachers}
        shared, rows = not self.bank.owners, torch.stack([view.rows for view in views], dim=1)
        logits = {SHARED if shared else name: rows @ banks[name].T for name in list(banks)[: 1 if shared else None]}
        places = {view.name: place for place, view in enumerate(views)}
        own = [logits[SHARED if shared else t.modality][:, places[t.name]].detach() for t in teachers]
        if self.codes != "own":
            own = [view.rows @ banks[view.modality].T for view in assigning]
        scores = torch.stack(own)
        codes = self._codes(scores, assigning, banks, step)
        entropies: dict[int, Tensor] = {}
        for owner, of_views in logits.items():
            assigned = [number for number, t in enumerate(teachers) if shared or t.modality == owner]
            entropy = -torch.bmm(codes[assigned].transpose(0, 1).contiguous(), of_views.log_softmax(dim=2).mT)
            entropies |= {number: entropy[:, place] for place, number in enumerate(assigned)}
        sums = []
        for number, teacher in enumerate(teachers):
            both = torch.stack([view.valid & teacher.valid for view in views], dim=1)
            sums.append((entropies[number] * both).sum(dim=0))
        losses = torch.stack(sums) * (world_size() / together.clamp(min=1).to(scores.dtype))
        metrics = self.usage.measure(head, assigning, scores, codes, update=self.training)
        if self.codes != "own":
            metrics.pop("code_agreement", None)  # joint codes agree by construction
        return losses, metrics

    @torch.no_grad()
    def _codes(self, logits: Tensor, assigning: list[View], banks: Mapping[str, Tensor], step: int) -> Tensor:
        """Codes ``[A, B, K]`` of this rank's rows, by Sinkhorn over all ranks and the queue.

        Args:
            logits: ``[A, B, K]``: scores over the temperature.
            assigning: Whose they are.
            banks: Per modality, prototypes over the temperature.
            step: Which step this is.
        """
        valid = torch.stack([view.valid for view in assigning])
        size = logits.shape[1]
        if self.queue is not None and self.training and step >= self.queue_start:
            queue, full = self.queue, self.queue.full_views()
            ready = [view.name in full for view in assigning]
            if any(ready):
                old = [queue.share(view.name, rank(), world_size()) @ banks[view.modality].T for view in assigning]
                filled = torch.tensor(ready, device=valid.device)[:, None].expand(-1, len(old[0]))
                logits, valid = torch.cat([logits, torch.stack(old)], dim=1), torch.cat([valid, filled], dim=1)
        groups = {
            "view": None,
            "modality": [self.names.index(view.modality) for view in assigning],
            "union": [0] * len(assigning),
        }[self.marginals]
        epsilon = self.epsilon / self.temperature
        codes = sinkhorn(logits, valid, epsilon=epsilon, iterations=self.iterations, groups=groups)[:, :size]
        if self.training and step < self.hard_steps:
            # Codes of a lone row are uniform but for rounding, which differs between ranks: the nearest prototype decides.
            near = codes >= (1 - TIE) * codes.amax(dim=2, keepdim=True)
            nearest = logits[:, :size].masked_fill(~near, -torch.inf).argmax(dim=2)
            rounded = F.one_hot(nearest, codes.shape[2]).to(codes.dtype)
            codes = rounded * valid[:, :size, None]
        return codes

    @torch.no_grad()
    def _push(self, assigning: list[View]) -> None:
        """Gather the features of all ranks, so that every rank holds the same queue, and keep them."""
        if self.queue is None:
            return
        rows = gather_rows(torch.stack([view.rows for view in assigning], dim=1))
        self.queue.check_batch(len(rows))
        valid = gather_rows(torch.stack([view.valid for view in assigning], dim=1).to(torch.uint8)).bool()
        self.queue.push({view.name: rows[valid[:, i], i] for i, view in enumerate(assigning)})

    @fp32
    @torch.no_grad()
    def score(self, *, target: str, candidates: Tensor, given: Embeddings, present: Presence | None = None) -> Tensor:
        """How well the candidate's clusters and those of what is given predict each other, as in training. See `Loss.score`.

        ``sum_m [ p_m . log p_c + p_c . log p_m ]`` over the given modalities, where ``p = softmax(z C^T / T)``, the first term
        on the prototypes of m, the second on those of the target; the mean over the sets of prototypes. Sinkhorn's codes
        depend on the batch; these depend on the row alone. On Emoji-M3 this finds far more than cosines do.
        """
        self.check_score(target, given, present)
        scores = []
        for head, (name, rows) in itertools.product(range(len(self.bank.counts)), given.items()):
            on_given, on_target = self.bank(name, head), self.bank(target, head)
            known, found = in_fp32(rows), in_fp32(candidates)
            swapped = self._clusters(known, on_given).exp() @ self._clusters(found, on_given).T
            swapped = swapped + self._clusters(known, on_target) @ self._clusters(found, on_target).exp().T
            scores.append(swapped if present is None else swapped * present[name][:, None])
        total: Tensor = torch.stack(scores).sum(dim=0) / len(self.bank.counts)
        return total

    def _clusters(self, rows: Tensor, prototypes: Tensor) -> Tensor:
        """Log probabilities ``[n, K]`` of the prototypes."""
        return (rows @ prototypes.T / self.temperature).log_softmax(dim=1)


def _check_pairs(pairs: str | Matrix, modalities: Sequence[str]) -> None:
    if not isinstance(pairs, str):
        return check_matrix(pairs, modalities, "pairs")
    check_choice("pairs", pairs, PAIRS)
    if pairs == "cross" and len(modalities) < 2:
        raise ConfigError(f"pairs='cross' needs two modalities, there is {list(modalities)}", fix="use 'all'")


def _views(embeddings: Embeddings, present: Presence | None) -> list[View]:
    """All views of all modalities, in order."""
    views = []
    for name, rows in embeddings.items():
        rows = in_fp32(rows if rows.ndim == 3 else rows[:, None])
        valid = torch.ones(len(rows), dtype=torch.bool, device=rows.device) if present is None else present[name]
        views += [View(name, number, rows[:, number], valid) for number in range(rows.shape[1])]
    return views


def _count_pairs(teachers: Sequence[View], views: Sequence[View]) -> Tensor:
    """``n_ab`` ``[A, V]`` over all ranks.

    Raises:
        LossError: On NaN or infinity in the rows of any rank, on every rank.
    """
    has = torch.stack([view.valid for view in views])
    taught = torch.stack([teacher.valid for teacher in teachers])
    bad = torch.stack([(~view.rows.isfinite().all(dim=1)).sum() for view in views])
    # No matrix product: there is none of integers on a GPU.
    counts = sum_over_ranks(torch.cat([(taught[:, None] & has[None]).sum(dim=2), bad[None]]))
    found: dict[str, int] = {}
    for view, number in zip(views, counts[-1].tolist(), strict=True):
        found[view.modality] = max(found.get(view.modality, 0), number)
    refuse_not_finite(found)
    return counts[:-1]


def _by_modality(
    terms: Tensor, together: Tensor, weights: list[list[float]], teachers: Sequence[View], views: Sequence[View]
) -> dict[str, Tensor]:
    """``a->b``: the mean of the terms between two modalities that the batch has."""
    found: dict[str, list[Tensor]] = {}
    some = together.tolist()
    for a, teacher in enumerate(teachers):
        for b, view in enumerate(views):
            if weights[a][b] and some[a][b]:
                found.setdefault(f"{teacher.modality}->{view.modality}", []).append(terms[a, b])
    return {name: torch.stack(values).mean() for name, values in found.items()}
