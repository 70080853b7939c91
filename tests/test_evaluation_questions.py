"""The control's swap and the batches."""

from hypothesis import given, settings
from hypothesis import strategies as st

from phi3v.evaluation.questions import Question, plan_batches, swap_pictures


def _questions(pictures: list[tuple[str, ...]]) -> list[Question]:
    return [Question(f"q{i}", images, "?", "?", ("a",)) for i, images in enumerate(pictures)]


def _same(questions: list[Question]) -> dict[str, str]:
    return {image: image for question in questions for image in question.images}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), max_size=2).map(lambda n: tuple(map(str, n))), max_size=40), st.integers(0, 99)
)
def test_no_question_gets_a_picture_of_its_own_back(pictures, seed):
    questions = _questions(pictures)
    swapped, left_out = swap_pictures(questions, _same(questions), seed)
    own = {question.id: question for question in questions}
    assert len(swapped) + len(left_out) == len(questions)
    for question in swapped:
        assert set(question.images).isdisjoint(own[question.id].images)
        assert len(question.images) == len(own[question.id].images)
        assert question.prompt == own[question.id].prompt
    # Pictures are handed round: none is used more often than it was there.
    for count in {len(images) for images in pictures}:
        given_out = sorted(q.images for q in swapped if len(q.images) == count)
        available = sorted(images for images in pictures if len(images) == count)
        for images in set(given_out):
            assert given_out.count(images) <= available.count(images)


def test_everyone_is_swapped_where_that_is_possible():
    questions = _questions([(f"{i // 2}",) for i in range(40)])  # every page has two questions
    swapped, left_out = swap_pictures(questions, _same(questions), seed=42)
    assert len(swapped) == 40 and not left_out
    assert swapped == swap_pictures(questions, _same(questions), seed=42)[0]
    assert swapped != swap_pictures(questions, _same(questions), seed=43)[0]


def test_equal_pictures_under_two_names_count_as_one():
    questions = _questions([("a.png",), ("copy of a.png",), ("b.png",), ("c.png",)])
    swapped, _ = swap_pictures(questions, {"a.png": "1", "copy of a.png": "1", "b.png": "2", "c.png": "3"}, seed=0)
    gift = {question.id: question.images[0] for question in swapped}
    assert gift["q0"] in ("b.png", "c.png") and gift["q1"] in ("b.png", "c.png")


def test_text_only_questions_have_no_control():
    questions = _questions([("a",), ("b",), ()])
    swapped, left_out = swap_pictures(questions, _same(questions), seed=0)
    assert [question.images for question in swapped] == [("b",), ("a",)] and left_out == ["q2"]


def test_batches_hold_each_example_once_longest_first():
    lengths = [5, 9, 1, 9, 3]
    batches = plan_batches(lengths, 2)
    assert batches == [[1, 3], [0, 4], [2]]
