"""A Gemini server on loopback, for tests, demos and dry runs: real protocol, scripted judge, scripted faults.

It speaks what google-genai (paths /v1 and /v1beta) and google-generativeai (/v1beta) send: generateContent,
countTokens, resumable file uploads, batches and file downloads, with Google's error bodies. The SDKs run
against it unmodified:

    from fasttrain_data.gemini_double import GeminiDouble

    def judge(question, images, answers):          # text, list of bytes, list of texts
        return [(4, 4, 4, 1, 1) if "red" in answer else (1, 0, 3, 1, 1) for answer in answers]

    with GeminiDouble(judge) as double:
        os.environ["GOOGLE_GEMINI_BASE_URL"] = double.url
        os.environ["GEMINI_API_KEY"] = double.api_key
        ...                                        # fasttrain-data annotate, or the SDK itself

As a process of its own: `python -m fasttrain_data.gemini_double --port 8080`.
"""

from fasttrain_data.gemini_double.faults import FAULTS, FaultMix, Faults, fault_free
from fasttrain_data.gemini_double.judges import Scores, hash_judge
from fasttrain_data.gemini_double.server import GeminiDouble, SeenCall

__all__ = ["FAULTS", "FaultMix", "Faults", "GeminiDouble", "Scores", "SeenCall", "fault_free", "hash_judge"]
