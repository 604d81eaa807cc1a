"""Instructions for the tasks of MTEB(eng), as prompts that a checkpoint carries.

``SentenceTransformer(modules=[gem], prompts=task_prompts())``, or ``model.prompts.update(task_prompts())`` before a
save, puts them into ``config_sentence_transformers.json``. From there ``model.encode(texts, prompt_name="STS12")`` and
mteb take them. mteb looks for ``<task>-query`` or ``<task>-document``, then ``<task>``, then the same with the type of
the task, and warns about keys that are none of these. What it finds for a document it uses, so that instructions for
queries alone must end in ``-query``.
"""

from __future__ import annotations

from collections.abc import Mapping

FORMAT = "{instruction}: "
"""LLM2Vec's own form, an instruction that ends in a colon, without its separator ``!@#$%^&*()``.

The separator tells LLM2Vec's mean pooling where the text begins. A GEM token reads instruction and text alike, and a
pretrained base has met "title: text", but hardly a row of punctuation or the markers of a chat.
"""

_CLAIM = "retrieve documents that support or refute the claim"
_CQADUPSTACK = (
    "Given a question, retrieve detailed question descriptions from Stackexchange that are duplicates to the given "
    "question"
)
_FORUMS = (
    *("Android", "English", "Gaming", "Gis", "Mathematica", "Physics"),
    *("Programmers", "Stats", "Tex", "Unix", "Webmasters", "Wordpress"),
)

# Tasks of queries and documents; documents have no instruction.
_QUERIES = {
    "ArguAna": "Given a claim, find documents that refute the claim",
    "ClimateFEVER": f"Given a claim about climate change, {_CLAIM}",
    **{f"CQADupstack{forum}Retrieval": _CQADUPSTACK for forum in _FORUMS},
    "DBPedia": "Given a query, retrieve relevant entity descriptions from DBPedia",
    "FEVER": f"Given a claim, {_CLAIM}",
    "FiQA2018": "Given a financial question, retrieve user replies that best answer the question",
    "HotpotQA": "Given a multi-hop question, retrieve documents that can help answer the question",
    "MSMARCO": "Given a web search query, retrieve relevant passages that answer the query",
    "NFCorpus": "Given a question, retrieve relevant documents that best answer the question",
    "NQ": "Given a question, retrieve Wikipedia passages that answer the question",
    "QuoraRetrieval": ("Given a question, retrieve questions that are semantically equivalent to the given question"),
    "SCIDOCS": "Given a scientific paper title, retrieve paper abstracts that are cited by the given paper",
    "SciFact": f"Given a scientific claim, {_CLAIM}",
    "Touche2020": "Given a question, retrieve detailed and persuasive arguments that answer the question",
    "TRECCOVID": "Given a query on COVID-19, retrieve documents that answer the query",
    "AskUbuntuDupQuestions": "Retrieve duplicate questions from AskUbuntu forum",
    "MindSmallReranking": "Retrieve relevant news articles based on user browsing history",
    "SciDocsRR": "Given a title of a scientific paper, retrieve the titles of other relevant papers",
    "StackOverflowDupQuestions": "Retrieve duplicate questions from StackOverflow forum",
}

# Tasks in which all texts are alike.
_TEXTS = {
    # "notcounterfactual" is how LLM2Vec spells it
    "AmazonCounterfactualClassification": (
        "Classify a given Amazon customer review text as either counterfactual or notcounterfactual"
    ),
    "AmazonPolarityClassification": "Classify Amazon reviews into positive or negative sentiment",
    "AmazonReviewsClassification": "Classify the given Amazon review into its appropriate rating category",
    "Banking77Classification": "Given a online banking query, find the corresponding intents",
    "EmotionClassification": (
        "Classify the emotion expressed in the given Twitter message into one of the six emotions: anger, fear, joy, "
        "love, sadness, and surprise"
    ),
    "ImdbClassification": "Classify the sentiment expressed in the given movie review text from the IMDB dataset",
    "MassiveIntentClassification": "Given a user utterance as query, find the user intents",
    "MassiveScenarioClassification": "Given a user utterance as query, find the user scenarios",
    "MTOPDomainClassification": "Classify the intent domain of the given utterance in task-oriented conversation",
    "MTOPIntentClassification": "Classify the intent of the given utterance in task-oriented conversation",
    "ToxicConversationsClassification": "Classify the given comments as either toxic or not toxic",
    "TweetSentimentExtractionClassification": (
        "Classify the sentiment of a given tweet as either positive, negative, or neutral"
    ),
    "ArxivClusteringP2P": (
        "Identify the main and secondary category of Arxiv papers based on the titles and abstracts"
    ),
    "ArxivClusteringS2S": "Identify the main and secondary category of Arxiv papers based on the titles",
    "BiorxivClusteringP2P": "Identify the main category of Biorxiv papers based on the titles and abstracts",
    "BiorxivClusteringS2S": "Identify the main category of Biorxiv papers based on the titles",
    "MedrxivClusteringP2P": "Identify the main category of Medrxiv papers based on the titles and abstracts",
    "MedrxivClusteringS2S": "Identify the main category of Medrxiv papers based on the titles",
    "RedditClustering": "Identify the topic or theme of Reddit posts based on the titles",
    "RedditClusteringP2P": "Identify the topic or theme of Reddit posts based on the titles and posts",
    "StackExchangeClustering": "Identify the topic or theme of StackExchange posts based on the titles",
    "StackExchangeClusteringP2P": "Identify the topic or theme of StackExchange posts based on the given paragraphs",
    "TwentyNewsgroupsClustering": "Identify the topic or theme of the given news articles",
    "SprintDuplicateQuestions": "Retrieve duplicate questions from Sprint forum",
    "TwitterSemEval2015": "Retrieve tweets that are semantically similar to the given tweet",
    "TwitterURLCorpus": "Retrieve tweets that are semantically similar to the given tweet",
    **dict.fromkeys(
        ("BIOSSES", "SICK-R", "STS12", "STS13", "STS14", "STS15", "STS16", "STS17", "STS22", "STSBenchmark"),
        "Retrieve semantically similar text",
    ),
    "SummEval": "Given a news summary, retrieve other semantically similar summaries",
}

# Tasks of MTEB(eng, v2), by the task of MTEB(eng, v1) that they were made of.
_NEW_QUERIES = {
    "ClimateFEVERHardNegatives": "ClimateFEVER",
    "FEVERHardNegatives": "FEVER",
    "HotpotQAHardNegatives": "HotpotQA",
    "Touche2020Retrieval.v3": "Touche2020",
}
_NEW_TEXTS = {
    "ArXivHierarchicalClusteringP2P": "ArxivClusteringP2P",
    "ArXivHierarchicalClusteringS2S": "ArxivClusteringS2S",
    "BiorxivClusteringP2P.v2": "BiorxivClusteringP2P",
    "MedrxivClusteringP2P.v2": "MedrxivClusteringP2P",
    "MedrxivClusteringS2S.v2": "MedrxivClusteringS2S",
    "StackExchangeClustering.v2": "StackExchangeClustering",
    "StackExchangeClusteringP2P.v2": "StackExchangeClusteringP2P",
    "TwentyNewsgroupsClustering.v2": "TwentyNewsgroupsClustering",
    "STS22.v2": "STS22",
    "SummEvalSummarization.v2": "SummEval",
}

INSTRUCTIONS: dict[str, str] = {
    **{f"{task}-query": text for task, text in _QUERIES.items()},
    **{f"{task}-query": _QUERIES[old] for task, old in _NEW_QUERIES.items()},
    **_TEXTS,
    **{task: _TEXTS[old] for task, old in _NEW_TEXTS.items()},
}
"""LLM2Vec's instructions, by the name of the prompt: all tasks of MTEB(eng, v1) and MTEB(eng, v2).

They are those of BehnamGhader et al. 2024 (arXiv 2404.05961), as in test_configs/mteb/task_to_instructions.json of
https://github.com/McGill-NLP/llm2vec (MIT licence, copyright 2024 McGill NLP), without the colon at their ends. Tasks
that only MTEB(eng, v2) has, take those of the tasks they were made of. As there, documents of retrieval and reranking
have none.
"""

TYPE_INSTRUCTIONS: dict[str, str] = {
    "Classification": "Classify user passages",
    "Clustering": "Identify categories in user passages",
    "PairClassification": "Retrieve text that is semantically similar to the given text",
    "Reranking-query": "Retrieve text based on user query",
    "Retrieval-query": "Retrieve text based on user query",
    "STS": "Retrieve semantically similar text",
    "Summarization": "Given a news summary, retrieve other semantically similar summaries",
}
"""Instructions by the type of a task, for tasks that have none of their own, local ones among them.

They are what mteb gives to models with instructions, LLM2Vec among them, for a task that has none; the grammar of one
is mended.
"""


def task_prompts(format: str = FORMAT, own: Mapping[str, str] | None = None) -> dict[str, str]:
    """Prompts for every task of MTEB(eng), and for every type of task.

    Args:
        format: How an instruction becomes a prompt; the text follows. For what E5 and Qwen3 Embedding take it is
            ``"Instruct: {instruction}\\nQuery: "``.
        own: More instructions, or others, by name: ``<task>``, or ``<task>-query`` if documents shall have none. mteb
            knows the names of its own tasks, and of those that were added to it.

    Returns:
        Prompts by name, for the ``prompts`` of a SentenceTransformer.

    Raises:
        ValueError: If the format has no place for the instruction.
    """
    if "{instruction}" not in format:
        raise ValueError(f"format must hold {{instruction}}, as in {FORMAT!r}, got {format!r}.")
    instructions = {**TYPE_INSTRUCTIONS, **INSTRUCTIONS, **(own or {})}
    return {name: format.replace("{instruction}", text) for name, text in instructions.items()}
