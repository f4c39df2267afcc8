"""Wrong edits of tools/check_lessons.py, one at a time: see tools/mutate.py."""

FILE = "tools/check_lessons.py"
MUTANTS = {
    "tests/test_check_lessons.py": [
        ("if body.strip() == source.strip() else", "if body.strip() in source else", "a part of a symbol is a quote"),
        ('".*?".join', '"(?s:.*?)".join', "three dots stand for whole lines of output"),
        ("and n > position", "", "the sections of a lesson may come in any order"),
        ('element.tag.endswith("}image") or', "", "a drawing may hold a picture in bytes"),
        ("if not quoted and block.info not in known:", "if False:", "a block with a misspelt word is never run"),
        ("failures += bool(errors)", "failures += 0", "a lesson that lies leaves CI green"),
        ('ROOT / "lessons" / "README.md"]', "]", "the list of lessons may lead nowhere"),
    ],
}
