"""Wrong edits of nanogspo/templates.py, one at a time: see tools/mutate.py."""

# ruff: noqa: E501      an edit is quoted as it stands in the code
FILE = "nanogspo/templates.py"
MUTANTS = {
    "tests/test_templates.py": [
        (
            "            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)\n",
            "            faulthandler.dump_traceback_later(30, exit=True, file=nowhere)\n",
            "a template may run for half a minute",
        ),
        (
            "            faulthandler.cancel_dump_traceback_later()\n",
            "",
            "the renderer is ended while it waits",
        ),
        (
            "resource.setrlimit(resource.RLIMIT_AS,",
            "resource.setrlimit(resource.RLIMIT_CORE,",
            "a template may take all memory",
        ),
        ("if len(text) <= CHARACTERS else", "if True else", "a template may print without end"),
        ("    except BaseException:", "    except ZeroDivisionError:", "an interrupted rendering answers the next one"),
        (
            'if os.name == "nt" else {"start_new_session": True}',
            'if os.name == "nt" else {}',
            "Ctrl-C ends the renderer before the update that it is to finish",
        ),
        ("    with _lock:\n", "    if True:\n", "threads read each other's renderings"),
    ],
}
