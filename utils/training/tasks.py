"""The text data sets that there are scripts for."""

from data.news import load_news
from data.questions import load_questions

from .text import TextTask

QUESTIONS = TextTask("question", "question_classifier", load_questions, "question", epochs=15)
NEWS = TextTask("news", "news_classifier", load_news, "news title", epochs=10)
