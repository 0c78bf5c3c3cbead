"""The operators on a model: what changes its transitions, and what the chain says that this does.

`augment` and `positions` work on token ids without torch; everything that reads or edits activations needs the extra
``models`` and is loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import ModelError

_HOME = {
    "activation_columns": ["with_activations"],
    "apart": ["Separation", "separate"],
    "augment": ["Row", "Triplet", "mixed", "recover", "recovery", "rotations", "token_share"],
    "beliefs": ["Beliefs", "Centres", "belief_table", "believe", "centres"],
    "blocking": ["Blocked", "guarded", "measure_blocked"],
    "chain_changes": ["ChainChange", "aligned", "chain_change", "identity_gap"],
    "chain_effects": ["ChainEffect", "chain_effect"],
    "coherence": ["Quality", "quality", "repeats"],
    "buckets": ["Buckets", "label"],
    "differences": ["by_category", "difference", "states"],
    "directions": ["Direction", "read_direction", "write_direction"],
    "edits": ["Edit", "Part", "read_edit", "write_edit"],
    "audit": ["Audit", "audit_heads"],
    "behaviour": ["Behaviour", "behave"],
    "guard": ["Assessed", "Attacked", "Guard", "assess", "latent_guard", "probe_beliefs", "under_attack"],
    "head_baselines": ["HeadProbes", "added_norm", "probe_heads", "whole_layer"],
    "head_choice": ["HeadChoice", "choose_heads"],
    "head_sweep": ["HeadSweep", "sweep_heads"],
    "heads": ["HeadDirections", "head_directions", "read_head_directions", "write_head_directions"],
    "effects": ["Effect", "LevelSweep", "choose_level", "effect"],
    "head_report": ["HeadReport", "inspect_heads", "write_report"],
    "host": ["Host", "open_host"],
    "imitation": ["Imitated"],
    "inspection": ["Inspection", "first_tokens", "inspect_model"],
    "inversion": ["Inversion", "Replies", "Task", "inversion_task", "invert", "replies"],
    "plane_axes": ["answer_axes", "running_means"],
    "policies": ["Policy", "policy"],
    "positions": ["Spans", "spans"],
    "preferences": ["Preference", "Preferred", "cleaned", "preference_rows"],
    "prediction": ["RowLocal", "row_local"],
    "record": ["activations", "head_outputs", "laws", "projections", "token_mass"],
    "signature": ["Signature", "depth_signature"],
    "start_row": ["StartRows", "start_rows"],
    "separation": ["auc", "curve", "probe", "silhouette"],
    "strength": ["AlphaPath", "alpha_path"],
    "objectives": ["Constrained", "CrossEntropy", "Distilled", "Objective", "Setting"],
    "alignment": ["Alignment", "align", "safety_rows"],
    "phrases": ["critical_phrases", "permutations", "permuted", "within_budget"],
    "triplets": ["Triplets", "read_triplets", "triplets_of"],
    "tuning": ["fine_tune"],
    "monitor": ["Monitor", "fit_monitor", "read_monitor", "write_monitor"],
    "bias_tables": ["BiasTable", "read_bias_table", "write_bias_table"],
    "debias": ["bias_table"],
    "debias_report": ["Debiased", "inspect_bias"],
    "exploration": ["explore"],
    "tilt_prediction": ["Tilted", "predict_tilt"],
    "tilt_processor": ["TiltProcessor"],
    "fronts": ["TradeOffs", "trade_offs", "win_rates"],
    "vulnerable": ["Vulnerabilities", "vulnerabilities"],
    "tilting": ["tilted_chain", "tilted_hitting"],
    "watch": ["Alarms", "Detection", "detection", "watching"],
    "data_drift": [
        "BatchDrift",
        "DataMonitor",
        "fit_data_monitor",
        "read_data_monitor",
        "watch_data",
        "write_data_monitor",
    ],
    "data_filter": ["RefusalFilter", "choose_threshold", "fit_filter", "read_filter", "write_filter"],
    "pairs": ["Pair", "read_pairs"],
    "refusal_features": ["RefusalGuided", "cosine_penalty", "feature_cosines"],
    "sifting": ["Sifted", "read_review", "reviewed", "sift", "write_review", "write_sifted"],
    "teacher": ["Taught", "train_student", "train_teacher"],
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
_OPTIONAL = ("accelerate", "peft", "torch", "transformers")
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _OPTIONAL:
            raise
        raise ModelError(
            f"{name} needs the package {error.name!r}, which is not installed",
            cause=str(error),
            next="pip install 'markovsafety[models]'",
        ) from error


def __dir__() -> list[str]:
    return __all__
