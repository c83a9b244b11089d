import math

import pytest
import torch

from megablip.config import PreferenceConfig
from megablip.model.preference import PREFERENCE_SUMS, Answers, divergence_sum, preference_loss


def answers(chosen, rejected, chosen_labels=(4.0, 2.0), rejected_labels=(8.0, 1.0)):
    return Answers(*map(torch.tensor, (chosen, rejected, chosen_labels, rejected_labels)))


POLICY, REFERENCE = answers([-4.0, -3.0], [-6.0, -2.0]), answers([-5.0, -3.5], [-5.0, -2.0])
H = [(-4 + 5) - (-6 + 5), (-3 + 3.5) - (-2 + 2)]  # 2.0, 0.5


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_sigmoid():
    found = preference_loss(POLICY, REFERENCE, PreferenceConfig(beta=0.5))
    assert float(found.loss) == pytest.approx(-sum(math.log(sigmoid(0.5 * h)) for h in H))
    assert float(found.margin) == pytest.approx(0.5 * sum(H))
    assert (int(found.accuracy), int(found.pairs)) == (2, 2)
    assert float(found.chosen_reward) == pytest.approx(0.5 * 1.5)
    assert float(found.rejected_reward) == pytest.approx(0.5 * -1.0)
    assert float(found.chosen_log_prob) == -7
    assert float(found.chosen_log_ratio) == 1 / 4 + 0.5 / 2


def test_label_smoothing_is_conservative_dpo():
    found = preference_loss(POLICY, REFERENCE, PreferenceConfig(beta=0.5, label_smoothing=0.2))
    wanted = sum(0.8 * -math.log(sigmoid(0.5 * h)) + 0.2 * -math.log(sigmoid(-0.5 * h)) for h in H)
    assert float(found.loss) == pytest.approx(wanted)


def test_ipo_is_per_label():
    found = preference_loss(POLICY, REFERENCE, PreferenceConfig(loss="ipo", beta=0.5))
    per_label = [1 / 4 - -1 / 8, 0.5 / 2 - 0 / 1]
    assert float(found.loss) == pytest.approx(sum((h - 1) ** 2 for h in per_label))


def test_length_normalized_and_with_the_chosen_answers_own_loss():
    config = PreferenceConfig(beta=0.5, length_normalized=True, sft_weight=0.3)
    per_label = [1 / 4 - -1 / 8, 0.5 / 2]
    wanted = -sum(math.log(sigmoid(0.5 * h)) for h in per_label) + 0.3 * (4 / 4 + 3 / 2)
    assert float(preference_loss(POLICY, REFERENCE, config).loss) == pytest.approx(wanted)


def test_answers_are_found_by_their_pair():
    loss = torch.arange(7.0)
    pair = torch.tensor([1, 1, -1, 0, 0, 2, 2], dtype=torch.int32)
    found = Answers.of(loss, loss + 10, pair)
    assert found.chosen.tolist() == [-3, 0, -5]
    assert found.rejected.tolist() == [-4, -1, -6]
    assert found.rejected_labels.tolist() == [14, 11, 16]


def test_nothing_of_the_loss_is_read_back():
    """A host that reads waits for the GPU; here the tensors have no values that could be read."""
    loss, pair = torch.zeros(3, device="meta"), torch.tensor([0, 0, -1], dtype=torch.int32)
    found = Answers.of(loss, loss, pair)
    sums = preference_loss(found, found, PreferenceConfig(sft_weight=1.0)).detached()
    assert (found.rejected.shape, sums.device.type) == ((1,), "meta")
    assert divergence_sum(loss, loss, pair).device.type == "meta"


def test_no_pairs_give_zero_and_gradients_of_zero():
    loss = torch.ones(2, requires_grad=True)
    none = Answers.of(loss, torch.zeros(2), torch.tensor([-1, -1]))
    config = PreferenceConfig(sft_weight=1.0, length_normalized=True)
    found = preference_loss(none, none, config)
    found.loss.backward()
    assert found.loss.detach() == 0
    assert loss.grad.tolist() == [0, 0]
    assert found.detached().tolist() == [0.0] * len(PREFERENCE_SUMS)


def test_smoothing_is_refused_elsewhere():
    with pytest.raises(ValueError, match="sigmoid"):
        PreferenceConfig(loss="ipo", label_smoothing=0.1)
