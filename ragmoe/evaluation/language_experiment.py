"""Running an experiment with language models: train each arm on documents, and measure its loss on others.

    ragmoe eval experiment eval/experiments/lm_domains.yaml --data DIR

Everything that was done is taken up again, as in experiment_run.py; an arm's figures lie in ``perplexity.json``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragmoe.evaluation.experiment import VALID, LanguageExperiment
from ragmoe.evaluation.experiment_folder import ExperimentFolder
from ragmoe.evaluation.experiment_report import Outcome, command_of, write
from ragmoe.evaluation.experiment_run import begin, bundle_of, open_folder
from ragmoe.evaluation.language_report import gather_language
from ragmoe.evaluation.language_results import FILE, LanguageResults, documents_digest, results_place
from ragmoe.evaluation.opening import Progress, index_of_recipe
from ragmoe.evaluation.perplexity import document_losses
from ragmoe.evaluation.perturbation import REAL
from ragmoe.evaluation.samples import digest_of

if TYPE_CHECKING:
    from ragmoe.corpus.types import Passage
    from ragmoe.index import Index
    from ragmoe.neighbours import Neighbours
    from ragmoe.training.callbacks import Shows
    from ragmoe.training.config import TrainingConfig
    from ragmoe.training.language import LanguageDataset


def run_language_experiment(
    experiment: LanguageExperiment,
    *,
    out: str | Path | None = None,
    only: Sequence[str] = (),
    command: str | None = None,
    say: Callable[[str], None] | None = None,
    index_progress: Progress | None = None,
    show_training: Shows | None = None,
) -> Outcome:
    """Run an experiment with language models, or go on with one; the arguments are those of ``run_experiment``.

    ``index_progress`` is told of retrieving and predicting too.

    Raises:
        RagmoeError: a file or an index is wrong, or an arm in ``out`` was trained with another configuration.
    """
    from ragmoe.corpus import read_documents
    from ragmoe.generation.batches import reads_neighbours

    root = begin(experiment, out, only)
    say = say or (lambda line: None)
    documents = {
        setting: list(read_documents([str(experiment.resolve(source)) for source in sources]))
        for setting, sources in experiment.settings.items()
    }
    index = index_of_recipe(experiment.resolve(experiment.index), progress=index_progress)
    folder = open_folder(experiment, root, index)
    digests = {setting: documents_digest(found, index.digest) for setting, found in documents.items()}
    for told in _learned_from(experiment, documents, index):
        say(told)
    for seed in experiment.seeds:
        for arm in only or experiment.arm_names:
            model, tokenizer, config = _model(folder, arm, seed, index, say, show_training)
            wanted = {REAL, *(experiment.perturbations if reads_neighbours(model) else ())}
            of_model = _digest(model, config)
            for setting, found in documents.items():
                place = results_place(folder, arm, seed, setting)
                known = LanguageResults.load(place)
                if known is not None and known.is_of(digests[setting], of_model) and known.losses.keys() == wanted:
                    continue
                named = "" if setting == VALID else f" of the setting {setting}"
                say(f"{arm}, seed {seed}: predicting {len(found)} documents{named}")
                data = _dataset(model, tokenizer, config, found, index, root / "cache", index_progress)
                of_both = (digests[setting], of_model)
                measured = _measure(model, data, index, sorted(wanted), of_both, index_progress)
                # Figures of before have gone when it is said of what commit they are.
                (place / FILE).unlink(missing_ok=True)
                folder.measured(arm, seed, setting, anew=True)
                measured.save(place)
    outcome = gather_language(folder, digests, command or command_of(experiment))
    outcome.written = write(outcome)
    return outcome


def _learned_from(
    experiment: LanguageExperiment, documents: Mapping[str, Sequence[Passage]], index: Index
) -> list[str]:
    """A line for each setting some of whose documents are learned from in the first arm: these it need not predict."""
    from ragmoe.corpus import read_documents

    config = experiment.training(next(iter(experiment.arms)), experiment.seeds[0], index.folder)
    learned = {hash(d.text) for d in read_documents(config.data.documents) if d.domain not in config.data.without}
    same = {setting: [d.id for d in found if hash(d.text) in learned] for setting, found in documents.items()}
    return [
        f"{len(ids)} of the {len(documents[setting])} documents to be predicted ({setting}) are learned from, such as "
        f"{ids[0]}: what is found there says little"
        for setting, ids in same.items()
        if ids
    ]


def _model(
    folder: ExperimentFolder, arm: str, seed: int, index: Index, say: Callable[[str], None], show: Shows | None
) -> tuple[Any, Any, TrainingConfig]:
    """An arm's model, trained first where it is not yet; its tokenizer; and its configuration."""
    from transformers import set_seed

    from ragmoe.generation import Generator
    from ragmoe.training.clusters import place_clusters
    from ragmoe.training.config import LanguageConfig
    from ragmoe.training.decoders import open_decoder

    config = folder.experiment.training(arm, seed, index.folder)
    if arm in folder.experiment.untrained_arms:
        folder.begin_untrained(arm, seed, config)
        # What is drawn at the start is drawn as in training.
        set_seed(config.seed)
        opened = open_decoder(config, index, (config.language or LanguageConfig()).neighbours)
        place_clusters(opened.model, index, seed=config.seed)
        return opened.model, opened.tokenizer, config
    generator = Generator.load(bundle_of(folder, arm, seed, index, say, show))
    return generator.model, generator.tokenizer, config


def _digest(model: Any, config: TrainingConfig) -> str:
    """Of a model's weights and of how documents are cut for it."""
    from ragmoe.models.digest import weights_digest
    from ragmoe.training.config import LanguageConfig

    return digest_of(weights_digest(model), (config.language or LanguageConfig()).model_dump(mode="json"))


def _dataset(
    model: Any,
    tokenizer: Any,
    config: TrainingConfig,
    documents: Sequence[Passage],
    index: Index,
    cache: Path,
    progress: Progress | None,
) -> LanguageDataset:
    """The chunks to be predicted, each once, with their neighbours for a model whose gate sees them."""
    from ragmoe.generation.batches import reads_neighbours, sees_neighbours
    from ragmoe.training.config import LanguageConfig
    from ragmoe.training.language import LanguageDataset
    from ragmoe.training.language_expert import recalling

    return LanguageDataset(
        documents,
        index if sees_neighbours(model) else None,
        tokenizer,
        config.language or LanguageConfig(),
        cache=cache,
        recall=recalling(model, index),
        retrieves=reads_neighbours(model),
        progress=partial(progress, "retrieving neighbours") if progress else None,
    )


def _measure(
    model: Any,
    data: LanguageDataset,
    index: Index,
    conditions: Sequence[str],
    digests: tuple[str, str],
    progress: Progress | None,
) -> LanguageResults:
    from ragmoe.moe import RoutingStatistics
    from ragmoe.training.decoders import decoder_parameters

    layers = list(getattr(model, "sparse_layers", ()))
    routed = RoutingStatistics(layers, model.config.experts) if layers and model.config.experts > 1 else None
    shown: Mapping[str, Callable[[int], Neighbours | None]] = {
        REAL: data.neighbours,
        "null": partial(_none, data, index),
        "shuffled": partial(_another, data),
    }
    losses = {
        name: document_losses(
            model,
            data,
            shown=shown[name],
            statistics=routed if name == REAL else None,
            progress=partial(progress, "chunks" if name == REAL else f"{name} neighbours") if progress else None,
        )
        for name in conditions
    }
    counts = decoder_parameters(model)
    sizes = {name: counts[name] for name in ("active", "total")}
    return LanguageResults(*digests, sizes, losses, routed.summary() if routed is not None else None)


def _none(data: LanguageDataset, index: Index, place: int) -> Neighbours:
    from ragmoe.neighbours import Neighbours

    empty = Neighbours.empty(1, index.width, data.config.neighbours)
    return data.recall(empty, data.documents[data.chunks[place].document].domain)


def _another(data: LanguageDataset, place: int) -> Neighbours | None:
    """The neighbours of the chunk that lies half of all chunks further on, or of the next after it that has some."""
    total = len(data.chunks)
    for step in range(total):
        other = (place + total // 2 + step) % total
        if data.chunks[other].number and data.chunks[other].document != data.chunks[place].document:
            return data.neighbours(other) if data.chunks[place].number else data.neighbours(place)
    return data.neighbours(place)
