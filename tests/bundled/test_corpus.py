from codesign.bundled import Document
from codesign.bundled.corpus import overlap, shingles, split


def document(name: str, first: int, last: int) -> Document:
    return Document(name=name, text="".join(f"line {number} of the text\n" for number in range(first, last)))


def test_a_copy_with_other_indentation_overlaps_fully() -> None:
    text = document("a", 0, 50).text

    assert overlap(shingles(text), shingles(text.replace("line", "    line"))) == 1


def test_unlike_texts_do_not_overlap() -> None:
    assert overlap(shingles(document("a", 0, 50).text), shingles(document("b", 100, 150).text)) == 0


def test_files_that_resemble_a_heldout_file_are_dropped() -> None:
    documents = [document(f"{number}.py", 1000 * number, 1000 * number + 200) for number in range(130)]
    before = split(documents)
    heldout = next(one for one in documents if before[one.name] == "heldout")
    copy = Document(name="copy.py", text=heldout.text + "one line more\n" * 3000)

    assert split([*documents, copy])["copy.py"] == f"dropped: near-duplicate of {heldout.name}"


def test_split_of_a_file_does_not_depend_on_the_order() -> None:
    documents = [document(f"{number}.py", 1000 * number, 1000 * number + 200) for number in range(130)]

    assert split(documents) == split(documents[::-1])
