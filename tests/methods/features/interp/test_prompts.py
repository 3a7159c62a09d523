from gossamer.methods.features.interp import prompts


def test_a_prompt_can_be_read_back():
    texts = ["a <<b>> c", "d:\ne", "Text 9: f"]
    asked = prompts.test_prompt(prompts.FUZZ, "words\nof  b", texts)
    kind, told, found = prompts.read_task(asked)
    assert (kind, told) == ("fuzz", "words of b")
    assert found == ["a <<b>> c", "d: e", "Text 9: f"]
    kind, told, found = prompts.read_task(prompts.explain_prompt(["x <<y>>"]))
    assert (kind, told, found) == ("explain", "", ["x <<y>>"])


def test_answers_of_another_form_are_no_answers():
    assert prompts.read_answer("[1, 0,1]", 3) == [True, False, True]
    assert prompts.read_answer("Such as [1, 0]? No: [0,0].", 2) == [False, False]
    assert prompts.read_answer("[1, 0]", 3) is None
    assert prompts.read_answer("yes, no", 2) is None
    assert prompts.read_answer("", 1) is None
