"""From where on what was measured is worth a person's attention."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Thresholds:
    """When a finding is made, and when it is more than information.

    The defaults are drawn so that a healthy pretrained or freshly initialised model has nothing above ``info``. What is
    said to be ours is a round number well away from what healthy models show, and not a law.

    Attributes:
        dead_share: a site with this share of dead units or more is a warning; any dead unit is information. Ours:
            Voita et al. 2023 find a few per cent in most layers of most models, above 70 % in early layers of OPT-66B.
        dead_share_critical: from here on the layer hardly does anything. Ours.
        dead_bound: dead units are a warning only if the text was long enough for this bound on their true frequency
            (`DeadUnits`); 0.003 takes about 1000 tokens.
        massive_ratio: largest over median activation from which on activations are called massive. Ours: normal ones
            reach about 10 (Gaussian: 7), pretrained models 100 to 10000, which is how they work and no fault.
        massive_limit: magnitude from which on massive activations are a warning: half of the largest float16, 65504.
        sink_rate: share of sequences in which a head must have a sink (`SinkScore`) to be called a sink head.
        outlier_energy: share of a token's energy in outlier channels from which on they are a warning: what is left
            for all others is then below what 8 bits resolve next to them. Ours.
        rank_share: effective rank over its possible maximum below which it has collapsed. Ours.
        rank_critical: an effective rank below this means that nearly all tokens are alike.
        idle_movement: relative movement of the stream below which a block is idle. Ours; pretrained blocks move it by
            0.05 to 1.
        logit: magnitude of a logit from which on logits explode: bfloat16 then resolves no finer than 4, a factor of
            50 in probability.
        logit_critical: from here on bfloat16 resolves no finer than 64. Ours; Wortsman et al. 2024 see training diverge
            when *attention* logits come to about this.
        zero_share: share of exact zeros at live units from which on a layer is called sparse: below it, skipping them
            seldom pays. Ours.
        int_error: power of the rounding error over that of the activations from which on 8 bits are said to lose
            something: 1 %, a signal to noise ratio of 20 dB. Ours.
        int_lost: share of activations that 8 bits round to zero and a finer scale would keep, from which on the same
            is said: an outlier channel holds so much of the power that the error alone looks harmless. Ours.
        spike_share: share of tokens with a spike (`Spikes`) from which on they are told; one massive first token stays
            below it. Ours.
        value_drain: norm of the first token's value over that of the others below which a head's values are drained.
            Ours; untrained heads show about 1, drained ones 0.1 and less.
        residual_peak: norm of the first token's state over that of the others from which on it is a peak. Ours.
        token_cosine: mean cosine between the tokens of a sequence from which on they are nearly one direction. Ours:
            pretrained streams are often at 0.5, the last layers of some at 0.9 and more.
        token_cosine_warning: from here on hardly anything tells tokens apart. Ours.
        sui: spectral utilisation below which a layer's width is called unused. Ours.
        sui_tokens: tokens a unit that must have been read for it to be judged.
        max_load: times its fair share that the busiest expert takes, from which on a mixture is unbalanced. Ours.
        router_information: share of what a router could tell tokens apart, below which it does not. Ours; fresh routers
            show 0.04 and more.
        calibration_error: mean gap between confidence and accuracy from which on predictions are miscalibrated. Ours:
            pretrained language models are at 0.01 to 0.05.
        repetition: how much more often neighbouring predictions are the same than neighbouring tokens of the text,
            from which on the model repeats itself. Ours; plateaus show 0.5 and more.
    """

    dead_share: float = 0.25
    dead_share_critical: float = 0.9
    dead_bound: float = 0.003
    massive_ratio: float = 100.0
    massive_limit: float = 32_752.0
    sink_rate: float = 0.5
    outlier_energy: float = 0.95
    rank_share: float = 0.05
    rank_critical: float = 1.5
    idle_movement: float = 0.01
    logit: float = 1e3
    logit_critical: float = 1e4
    zero_share: float = 0.8
    int_error: float = 0.01
    int_lost: float = 0.3
    spike_share: float = 0.05
    value_drain: float = 0.3
    residual_peak: float = 5.0
    token_cosine: float = 0.95
    token_cosine_warning: float = 0.99
    sui: float = 0.02
    sui_tokens: float = 1.0
    max_load: float = 3.0
    router_information: float = 0.02
    calibration_error: float = 0.1
    repetition: float = 0.3
