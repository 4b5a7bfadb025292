"""What can be said of a stream of activations."""

from .alignment import Alignment, align
from .attention import AttentionEntropy, SinkScore
from .cca import CCA, SVCCA
from .cett import CETT, cett
from .cka import CKA, LinearCKA
from .codes import ActivationCode, code_accuracy, codes_of
from .contribution import Contribution
from .criticality import centre_of_gravity, criticality_profile, layer_criticality
from .delta import DeltaSparsity
from .depth import Movement
from .dirichlet import DirichletEnergy, spectral_alignment
from .diversity import HypersphericalEnergy, hyperspherical_energy
from .drains import ResidualPeak, ValueDrain, extreme_tokens
from .edit_distance import edit_distance
from .eigenscore import EfficientEigenScore, EigenScore
from .entropy_reduction import EntropyReduction, EntropyTrace, conditional_entropy
from .extremes import MassiveActivations, OutlierChannels, outlier_dimensions
from .feature_information import FeatureInformation
from .feature_variance import FeatureVariance, feature_rsa
from .filters import FilterQuality, filter_drift
from .findings import Finding, Thresholds, find
from .gradient_sign import GradientSign, gradient_sign
from .heads import DormantHeads, dormant_heads, head_ablation_by_domain
from .histogram import Histogram
from .icl import bma, bma_gap, icl_regret, regret_slope, ridge_prediction
from .induction import InductionScore
from .induction_strength import InductionStrength
from .invariance import Invariance, measure_invariance
from .kernel_alignment import TangentKernelAlignment, kernel_alignment, label_kernel, representation_alignment
from .kurtosis import Kurtosis
from .layer_gradients import GradientSpectrum, layer_gradients
from .linear_layers import as_dsf, attention_to_dsf, gated_rnn, random_features, selective_ssm, taylor_features
from .linear_systems import DSF
from .logit_max import AttentionLogitMax
from .loss import NextTokenLoss
from .matrix_entropy import MatrixEntropy
from .mutual_information import AdaptiveEdges, MutualInformation, compression
from .neighbours import MutualKNN
from .neural_collapse import CentreAgreement, NeuralCollapse, layerwise_collapse, near_collapse_model
from .panels import PANELS, Panel
from .pathways import PathwayConsistency, PathwayDistance, expert_embeddings
from .permutation import Axis, Group, permutation_groups, permuted
from .posterior_collapse import PosteriorCollapse, linear_vae_forecast
from .ppl_sparsity import Silenced, ppl_sparsity, silenced
from .preference import ches
from .procrustes import Procrustes
from .quantisation import QuantisationError
from .regions import region_diameter, regions_on_segment
from .router import ExpertLoad, RouterEntropy
from .rsa import RSA
from .scale import ActivationScale
from .screening import screen
from .semantic_entropy import meanings, semantic_entropy
from .set_variability import SetVariability
from .similarity import compare, similarity
from .sparsity import DeadUnits, Sparsity, UnitFrequency
from .spectrum import EffectiveRank, Spectrum
from .spikes import Spikes
from .steps import PerceptualReward, StepSegmenter
from .stiffness import Stiffness
from .tangent_kernel import tangent_kernel
from .token_collapse import AttentionProgress, RepetitionFrequency, TokenCollapse, ngram_repetition, repetition
from .trajectory import LatentTrajectory, TrajectorySignals, trajectory_signals
from .uncertainty import TokenUncertainty, token_uncertainty
from .v_information import v_information
from .voids import Voids

__all__ = [
    "CCA",
    "CETT",
    "CKA",
    "DSF",
    "PANELS",
    "RSA",
    "SVCCA",
    "ActivationCode",
    "ActivationScale",
    "AdaptiveEdges",
    "Alignment",
    "AttentionEntropy",
    "AttentionLogitMax",
    "AttentionProgress",
    "Axis",
    "CentreAgreement",
    "Contribution",
    "DeadUnits",
    "DeltaSparsity",
    "DirichletEnergy",
    "DormantHeads",
    "EffectiveRank",
    "EfficientEigenScore",
    "EigenScore",
    "EntropyReduction",
    "EntropyTrace",
    "ExpertLoad",
    "FeatureInformation",
    "FeatureVariance",
    "FilterQuality",
    "Finding",
    "GradientSign",
    "GradientSpectrum",
    "Group",
    "Histogram",
    "HypersphericalEnergy",
    "InductionScore",
    "InductionStrength",
    "Invariance",
    "Kurtosis",
    "LatentTrajectory",
    "LinearCKA",
    "MassiveActivations",
    "MatrixEntropy",
    "Movement",
    "MutualInformation",
    "MutualKNN",
    "NeuralCollapse",
    "NextTokenLoss",
    "OutlierChannels",
    "Panel",
    "PathwayConsistency",
    "PathwayDistance",
    "PerceptualReward",
    "PosteriorCollapse",
    "Procrustes",
    "QuantisationError",
    "RepetitionFrequency",
    "ResidualPeak",
    "RouterEntropy",
    "SetVariability",
    "Silenced",
    "SinkScore",
    "Sparsity",
    "Spectrum",
    "Spikes",
    "StepSegmenter",
    "Stiffness",
    "TangentKernelAlignment",
    "Thresholds",
    "TokenCollapse",
    "TokenUncertainty",
    "TrajectorySignals",
    "UnitFrequency",
    "ValueDrain",
    "Voids",
    "align",
    "as_dsf",
    "attention_to_dsf",
    "bma",
    "bma_gap",
    "centre_of_gravity",
    "cett",
    "ches",
    "code_accuracy",
    "codes_of",
    "compare",
    "compression",
    "conditional_entropy",
    "criticality_profile",
    "dormant_heads",
    "edit_distance",
    "expert_embeddings",
    "extreme_tokens",
    "feature_rsa",
    "filter_drift",
    "find",
    "gated_rnn",
    "gradient_sign",
    "head_ablation_by_domain",
    "hyperspherical_energy",
    "icl_regret",
    "kernel_alignment",
    "label_kernel",
    "layer_criticality",
    "layer_gradients",
    "layerwise_collapse",
    "linear_vae_forecast",
    "meanings",
    "measure_invariance",
    "near_collapse_model",
    "ngram_repetition",
    "outlier_dimensions",
    "permutation_groups",
    "permuted",
    "ppl_sparsity",
    "random_features",
    "region_diameter",
    "regions_on_segment",
    "regret_slope",
    "repetition",
    "representation_alignment",
    "ridge_prediction",
    "screen",
    "selective_ssm",
    "semantic_entropy",
    "silenced",
    "similarity",
    "spectral_alignment",
    "tangent_kernel",
    "taylor_features",
    "token_uncertainty",
    "trajectory_signals",
    "v_information",
]
