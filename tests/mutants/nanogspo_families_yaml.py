"""Wrong edits of nanogspo/families.yaml, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the file
FILE = "nanogspo/families.yaml"
MUTANTS = {
    "tests/test_families.py": [
        (
            "defaults: {max_position_embeddings: 2048}",
            "defaults: {}",
            "another context than the class has where the file is silent",
        ),
        (
            "softcaps: [final_logit_softcapping]",
            "softcaps: [attn_logit_softcapping, final_logit_softcapping]",
            "Gemma 3's attention cap, which transformers ignores",
        ),
        ("qwen3_vl: 500000.0,", "qwen3_vl: 10000.0,", "Qwen 3 VL without a rope_theta turns at Llama's"),
    ],
}
