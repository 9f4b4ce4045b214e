"""Methods that train parts of the model as it is: everything, the head, the last blocks, one after the other."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from hftl import backbones
from hftl.arguments import TransferArguments, is_pretrained
from hftl.errors import UsageError
from hftl.losses import CosinePairLoss
from hftl.methods.plan import (
    PAIR_EPOCHS,
    PAIR_STEPS,
    PARTIAL_BLOCKS,
    Plan,
    Stage,
    after_head,
    all_parameters,
    blocks_to_unfreeze,
    default_rates,
    head_stage,
    make_stage,
    resolved_rates,
)
from hftl.methods.reinit import reinitialise
from hftl.problems import problem_of


def full(model: nn.Module, arguments: TransferArguments) -> Plan:
    """Everything trains, the new head faster than the backbone (Girshick et al. 2014; of texts Devlin et al. 2019).

    Running statistics of BatchNorm stay the pretrained ones: small batches of a small data set estimate them badly
    (cats against dogs: 0.971 frozen, 0.961 trained).
    """
    reinitialise(model, arguments)
    rates = resolved_rates(model, arguments)
    stage = make_stage(arguments, "all", all_parameters(model), rates.backbone, rates.head)
    return Plan(model, (stage,), {"learning_rate": rates.backbone, "head_learning_rate": rates.head})


def frozen(model: nn.Module, arguments: TransferArguments) -> Plan:
    """The head alone trains, on fixed features (linear probing, Alain and Bengio 2017).

    Five epochs: the problem is small and convex.

    With `--batch_norm adapt` on features whose statistics are those of the training images (AdaBN, Li et al. 2016).
    """
    default = default_rates(model, is_pretrained(arguments)).head
    rate = arguments.head_learning_rate or arguments.learning_rate or default
    stage = make_stage(arguments, "head", backbones.head_parameters(model), rate, rate)
    statistics = arguments.batch_norm or "frozen"
    stage = replace(stage, epochs=arguments.num_train_epochs or 5.0, batch_norm=statistics, layer_decay=1.0)
    return Plan(model, (stage,), {"head_learning_rate": rate})


def zero_shot(model: nn.Module, arguments: TransferArguments) -> Plan:
    """Nothing trains: the head of a dual encoder is the texts of its classes (Radford et al. 2021, 3.1).

    Vectors to search by need no head that knows classes: they are the pretrained features, turned.

    Raises:
        UsageError: the head is another one.
    """
    if not backbones.starts_from_texts(model) and not problem_of(arguments).answers_untrained:
        raise UsageError(
            f"--method zero_shot: {type(model).__name__} has no head of texts. It is for image-classification with a "
            "dual encoder: CLIP, SigLIP and their kin."
        )
    return Plan(model, (Stage("zero-shot", frozenset(), 0.0, 0.0, epochs=0.0),))


def setfit(model: nn.Module, arguments: TransferArguments) -> Plan:
    """The body is tuned on pairs of rows, then the head is solved on its features (SetFit, Tunstall et al. 2022).

    Rows of one class are drawn together and those of two classes apart, until the cosines of their features say which
    is which. Ten epochs, which are at least 20 steps. With 16 texts a class (MiniLM, one draw) test accuracy is 0.695,
    0.720 and 0.916 (SST-2, movie reviews, TREC); in three times as many 0.661 and 0.686 for the first two, in a third
    0.886 for the last.
    """
    default = default_rates(model, is_pretrained(arguments))
    rate = arguments.learning_rate or default.backbone
    fixed = (*backbones.structure(model).head, *backbones.pooling_layer(model))  # the mean stays a mean
    names = [name for name in all_parameters(model) if not backbones.is_below_any(name, fixed)]
    pairs = make_stage(arguments, "pairs", names, rate, rate)
    epochs, least = (arguments.num_train_epochs, 0) if arguments.num_train_epochs else (PAIR_EPOCHS, PAIR_STEPS)
    pairs = replace(pairs, epochs=epochs, least_steps=least, loss=CosinePairLoss(), headless=True)
    (head,) = frozen(model, arguments).stages
    head = replace(head, learning_rate=default.head, head_learning_rate=default.head, epochs=epochs, least_steps=least)
    return Plan(model, (pairs, head), {"learning_rate": rate})


def partial(model: nn.Module, arguments: TransferArguments) -> Plan:
    """The last k blocks and the head train (Yosinski et al. 2014: late features are the specific ones)."""
    blocks = backbones.parameter_blocks(model)
    head = max(blocks.values())
    count = blocks_to_unfreeze(arguments, head, PARTIAL_BLOCKS)
    if (arguments.reinit_blocks or 0) > count:
        raise UsageError(
            f"--reinit_blocks {arguments.reinit_blocks} is more than the {count} blocks that train "
            "(--unfreeze_blocks): the others would stay random."
        )
    reinitialise(model, arguments)
    names = [name for name, block in blocks.items() if block >= head - count]
    rates = resolved_rates(model, arguments)
    stage = make_stage(arguments, f"last {count} blocks", names, rates.backbone, rates.head)
    settings = {"learning_rate": rates.backbone, "head_learning_rate": rates.head, "unfreeze_blocks": count}
    return Plan(model, (stage,), settings)


def lp_ft(model: nn.Module, arguments: TransferArguments) -> Plan:
    """First the head, then everything (Kumar et al. 2022: a fitted head distorts features less).

    The second stage has one rate, as in the paper, unless one is given for the head: that is fitted, and ten times the
    rate of the backbone would undo it (TREC, 16 a class, three draws: 0.820 where one rate has 0.879).

    The second stage starts from a tenth of a solved head, see `hftl.methods.plan.after_head`. Accuracy on test with the
    whole head, a tenth of it, and of `full`, MiniLM, 16 a class, mean of three draws: TREC 0.781, 0.879, 0.835; movie
    snippets 0.672, 0.692, 0.671; SST-2 0.655, 0.665, 0.656; 2,000 movie snippets, two draws 0.831, 0.837, 0.834. With
    three tenths TREC has 0.864. EfficientNet-Lite0, two draws of digits: 0.901, 0.926, 0.894; one of cats and dogs
    0.929, 0.961, 0.950. Not everywhere: macro F1 on blood cells, three draws, a tenth and `full`: 0.982, 0.990.
    """
    reinitialise(model, arguments)
    rates = resolved_rates(model, arguments)
    given = arguments.head_learning_rate is not None
    if not given:  # a given or found rate is that of the second stage: the first does not depend on it
        rates = replace(rates, head=default_rates(model, is_pretrained(arguments)).head)
    first = head_stage(model, arguments, rates)
    second = make_stage(
        arguments, "all", all_parameters(model), rates.backbone, rates.head if given else rates.backbone
    )
    second = after_head(second, model, arguments)
    settings = {"learning_rate": rates.backbone, "head_epochs": first.epochs}
    return Plan(model, (first, second), settings | ({"head_learning_rate": rates.head} if given else {}))
