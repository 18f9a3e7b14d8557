"""Whose work a report cites: one line a source, and which one an architecture or an objective follows."""

from __future__ import annotations

REFERENCES = {
    "vsd": "Zou, Li, Huang, Zhou. Variational Speculative Decoding: Rethinking Draft Training from Token Likelihood "
    "to Sequence Acceptance. arXiv 2602.05774.",
    "gto": "Hu, Li, Lu, Zhou. Bridging Draft Policy Misalignment: Group Tree Optimization for Speculative Decoding. "
    "arXiv 2509.22134.",
    "eagle3": "Li et al. EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test. "
    "arXiv 2503.01840.",
    "coupling": "Daliri et al. Coupling without Communication and Drafter-Invariant Speculative Decoding. "
    "arXiv 2408.07978.",
    "eagle2": "Li et al. EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees. arXiv 2406.16858.",
    "eagle": "Li et al. EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty. arXiv 2401.15077.",
    "medusa": "Cai et al. Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads. "
    "arXiv 2401.10774.",
    "msd": "Lin et al. Speculative Decoding Reimagined for Multimodal Large Language Models. arXiv 2505.14260.",
    "vispec": "Kang et al. ViSpec: Accelerating Vision-Language Models with Vision-Aware Speculative Decoding. "
    "arXiv 2509.15235.",
    "distillspec": "Zhou et al. DistillSpec: Improving Speculative Decoding via Knowledge Distillation. "
    "arXiv 2310.08461.",
    "hass": "Zhang et al. Learning Harmonized Representations for Speculative Sampling. arXiv 2408.15766.",
    "lk": "Samarin et al. LK Losses: Direct Acceptance Rate Optimization for Speculative Decoding. arXiv 2602.23881.",
    "eal": "Xia et al. Acceptance-Aware Draft Model Training for Speculative Decoding. arXiv 2609.24150. Whalen, Ito, "
    "Sakamoto. Teaching Diffusion to Speculate Left-to-Right. arXiv 2606.11552.",
    "leviathan": "Leviathan, Kalman, Matias. Fast Inference from Transformers via Speculative Decoding. "
    "arXiv 2211.17192.",
    "mtbench": "Zheng et al. Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena. arXiv 2306.05685.",
    "humaneval": "Chen et al. Evaluating Large Language Models Trained on Code. arXiv 2107.03374.",
    "gsm8k": "Cobbe et al. Training Verifiers to Solve Math Word Problems. arXiv 2110.14168.",
    "smollm2": "Ben Allal et al. SmolLM2: When Smol Goes Big. arXiv 2502.02737.",
    "bca": "B. Efron. Better Bootstrap Confidence Intervals. Journal of the American Statistical Association 82, 1987.",
    "hesterberg": "T. C. Hesterberg. What Teachers Should Know About the Bootstrap: Resampling in the Undergraduate "
    "Statistics Curriculum. The American Statistician 69, 2015.",
    "holm": "S. Holm. A Simple Sequentially Rejective Multiple Test Procedure. Scandinavian Journal of Statistics 6, "
    "1979.",
}
"""Key to reference line, of every source that a report may cite."""
OF_TYPES = {
    "eagle3": "eagle3", "eagle": "eagle", "medusa": "medusa", "msd": "msd", "vispec": "vispec",
    "draft_model": "leviathan",
}  # fmt: skip
"""Sources of architectures."""
OF_OBJECTIVES = {
    "vsd": "vsd", "gto": "gto", "eal": "eal", "rkl": "distillspec", "jsd": "distillspec", "tvd": "distillspec",
    "topk": "hass", "lk": "lk", "coupled": "coupling", "onpolicy": "distillspec", "feature": "eagle",
}  # fmt: skip
"""Sources of objectives."""
