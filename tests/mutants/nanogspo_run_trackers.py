"""Wrong edits of nanogspo/run/trackers.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/run/trackers.py"
MUTANTS = {
    "tests/test_trackers.py": [
        ("    except Exception as error:", "    except ZeroDivisionError as error:", "a missing login is a traceback"),
        ('f"{phase}{k}": v', "k: v", "SFT's loss and RL's in one curve"),
        ("held.callback(package.finish)", "pass", "a run that the tracker believes to go on"),
        ('and k != "step"', "", "the step as a curve"),
        ('{"id": key, "dir": str(folder)}', '{"dir": str(folder)}', "a resumed run is another one"),
    ],
}
