"""LongBench's tasks: prompts, answer lengths and metrics, as they are published.

Bai et al., arXiv 2308.14508; the repository THUDM/LongBench, `config/dataset2prompt.json`,
`config/dataset2maxlen.json` and `eval.py` in its folder `LongBench`, to the letter, spelling
mistakes included: scores are comparable only then. The English tasks and code; KIVI reports all of
them but `passage_count`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.quality.tasks import longbench_metrics as metrics


@dataclass(frozen=True)
class Task:
    """One data set of LongBench.

    Attributes:
        prompt: with `{context}` and `{input}`.
        max_tokens: of the answer.
        metric: score, 0 .. 1, of a prediction, a right answer and the classes.
        few_shot: the prompt has examples: only the answer's first line counts.
        chat: whether chat models get their template around the prompt.

    """

    prompt: str
    max_tokens: int
    metric: Callable[[str, str, list[str]], float]
    few_shot: bool = False
    chat: bool = True


MULTI_HOP = (
    "Answer the question based on the given passages. Only give me the answer and "
    "do not output any other words.\n\n"
    "The following are given passages.\n"
    "{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and "
    "do not output any other words.\n\n"
    "Question: {input}\n"
    "Answer:"
)


TASKS: dict[str, Task] = {
    "narrativeqa": Task(
        "You are given a story, which can be either a novel or a movie script, and a "
        "question. Answer the question asconcisely as you can, using a single phrase "
        "if possible. Do not provide any explanation.\n\n"
        "Story: {context}\n\n"
        "Now, answer the question based on the story asconcisely as you can, using a "
        "single phrase if possible. Do not provide any explanation.\n\n"
        "Question: {input}\n\n"
        "Answer:",
        128,
        metrics.qa_f1,
    ),
    "qasper": Task(
        "You are given a scientific article and a question. Answer the question as "
        "concisely as you can, using a single phrase or sentence if possible. If the "
        "question cannot be answered based on the information in the article, write "
        '"unanswerable". If the question is a yes/no question, answer "yes", "no", or '
        '"unanswerable". Do not provide any explanation.\n\n'
        "Article: {context}\n\n"
        " Answer the question based on the above article as concisely as you can, "
        "using a single phrase or sentence if possible. If the question cannot be "
        'answered based on the information in the article, write "unanswerable". If '
        'the question is a yes/no question, answer "yes", "no", or "unanswerable". Do '
        "not provide any explanation.\n\n"
        "Question: {input}\n\n"
        "Answer:",
        128,
        metrics.qa_f1,
    ),
    "multifieldqa_en": Task(
        "Read the following text and answer briefly.\n\n"
        "{context}\n\n"
        "Now, answer the following question based on the above text, only give me the "
        "answer and do not output any other words.\n\n"
        "Question: {input}\n"
        "Answer:",
        64,
        metrics.qa_f1,
    ),
    "hotpotqa": Task(
        MULTI_HOP,
        32,
        metrics.qa_f1,
    ),
    "2wikimqa": Task(
        MULTI_HOP,
        32,
        metrics.qa_f1,
    ),
    "musique": Task(
        MULTI_HOP,
        32,
        metrics.qa_f1,
    ),
    "gov_report": Task(
        "You are given a report by a government agency. Write a one-page summary of "
        "the report.\n\n"
        "Report:\n"
        "{context}\n\n"
        "Now, write a one-page summary of the report.\n\n"
        "Summary:",
        512,
        metrics.rouge_l,
    ),
    "qmsum": Task(
        "You are given a meeting transcript and a query containing a question or "
        "instruction. Answer the query in one or more sentences.\n\n"
        "Transcript:\n"
        "{context}\n\n"
        "Now, answer the query based on the above meeting transcript in one or more "
        "sentences.\n\n"
        "Query: {input}\n"
        "Answer:",
        512,
        metrics.rouge_l,
    ),
    "multi_news": Task(
        "You are given several news passages. Write a one-page summary of all news. \n\n"
        "News:\n"
        "{context}\n\n"
        "Now, write a one-page summary of all the news.\n\n"
        "Summary:",
        512,
        metrics.rouge_l,
    ),
    "trec": Task(
        "Please determine the type of the question below. Here are some examples of "
        "questions.\n\n"
        "{context}\n"
        "{input}",
        64,
        metrics.classification,
        few_shot=True,
        chat=False,
    ),
    "triviaqa": Task(
        "Answer the question based on the given passage. Only give me the answer and "
        "do not output any other words. The following are some examples.\n\n"
        "{context}\n\n"
        "{input}",
        32,
        metrics.qa_f1,
        few_shot=True,
        chat=False,
    ),
    "samsum": Task(
        "Summarize the dialogue into a few short sentences. The following are some "
        "examples.\n\n"
        "{context}\n\n"
        "{input}",
        128,
        metrics.rouge_l,
        few_shot=True,
        chat=False,
    ),
    "passage_count": Task(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be "
        "duplicates. Please carefully read these paragraphs and determine how many "
        "unique paragraphs there are after removing duplicates. In other words, how "
        "many non-repeating paragraphs are there in total?\n\n"
        "{context}\n\n"
        "Please enter the final count of unique paragraphs after removing duplicates. "
        "The output format should only contain the number, such as 1, 2, 3, and so on.\n\n"
        "The final answer is: ",
        32,
        metrics.count,
    ),
    "passage_retrieval_en": Task(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please "
        "determine which paragraph the abstract is from.\n\n"
        "{context}\n\n"
        "The following is an abstract.\n\n"
        "{input}\n\n"
        "Please enter the number of the paragraph that the abstract is from. The "
        'answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\n'
        "The answer is: ",
        32,
        metrics.retrieval,
    ),
    "lcc": Task(
        "Please complete the code given below. \n{context}Next line of code:\n",
        64,
        metrics.code_similarity,
        chat=False,
    ),
    "repobench-p": Task(
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
        64,
        metrics.code_similarity,
        chat=False,
    ),
}

KIVI_TASKS = tuple(name for name in TASKS if name != "passage_count")
"""The 15 tasks of KIVI's `docs/long_bench.md`."""
