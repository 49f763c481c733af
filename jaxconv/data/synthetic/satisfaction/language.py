"""What users and assistants say, in three languages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Language:
    """The words of one language.

    Attributes:
        share: of the conversations.
        topics: of each domain.
        requests: ways to ask for something, by intent; `{topic}` is filled in.
        answers: of the assistant.
        goodbyes: of the assistant, when nothing is asked.
        causes: ways to show a cause, by cause; `repetition` is none of them. Of three ways the last
            is for held-out conversations.
        again: what may come before a request that is repeated.
        either: what satisfied and dissatisfied users say alike.
        evasive: answers that are none, after which such words mean the opposite.
    """

    share: float
    topics: Mapping[str, Sequence[str]]
    requests: Mapping[str, Sequence[str]]
    answers: Sequence[str]
    goodbyes: Sequence[str]
    causes: Mapping[str, Sequence[str]]
    again: Sequence[str]
    either: Sequence[str]
    evasive: Sequence[str]


ENGLISH = Language(
    share=0.7,
    topics={
        "travel": ("a weekend in Lisbon", "night trains", "a hotel near the sea", "lost luggage"),
        "cooking": ("sourdough", "a birthday cake", "lentil soup", "a meal without nuts"),
        "code": ("a failing unit test", "merge conflicts", "a slow query", "date parsing"),
        "money": ("a savings plan", "card fees", "a wrong invoice", "tax classes"),
        "health": ("sore knees after running", "sleep", "a stretching plan", "reading glasses"),
        "writing": ("a letter of complaint", "a thank-you note", "a speech", "a short story"),
    },
    requests={
        "explain": (
            "Can you explain {topic} to me?",
            "What should I know about {topic}?",
            "How does one go about {topic}?",
        ),
        "compare": (
            "What are the options for {topic}, and which is better?",
            "Compare two ways to deal with {topic}.",
            "Is there a cheaper way when it comes to {topic}?",
        ),
        "create": (
            "Write me a few lines about {topic}.",
            "Draft something on {topic}, friendly please.",
            "I need a text about {topic} that says how great the team is.",
        ),
        "fix": (
            "I have a problem with {topic}, nothing works. What can I do?",
            "Something is wrong with {topic}. Help me, please.",
            "My friend is unhappy with {topic} and says it is useless. Any advice?",
        ),
        "plan": (
            "Make a plan for {topic}.",
            "What are the next steps for {topic}?",
            "Give me a list for {topic}.",
        ),
    },
    answers=(
        "About {topic}: begin small, write down what you find, and look at it again after a week.",
        "There are two ways with {topic}. The first is quick, the second lasts longer.",
        "For {topic} people often make one mistake: they do everything at once. Sorry for them!",
        "Thank you for asking. With {topic} I would first check what you have already.",
        "Here is a list for {topic}: prepare, try, compare, decide.",
        "Great question! {topic} depends on how much time you have.",
    ),
    goodbyes=("You are welcome.", "All right.", "Good luck with it!", "I understand."),
    causes={
        "gratitude": (
            "Thanks a lot.",
            "I appreciate the effort.",
            "Cheers, that saved my evening.",
            "Thank you, you have been kind.",
            "Much obliged!",
            "I owe you one.",
        ),
        "praise": (
            "That is exactly what I was after.",
            "Great answer.",
            "Not bad at all, better than the manual.",
            "Perfect, and so clear.",
            "You nailed it.",
            "I could not have put it better.",
        ),
        "follow_up": (
            "Good, and building on that:",
            "Since that was useful, one step further:",
            "I like the second way; let us go deeper.",
            "Interesting! That makes me curious.",
            "With that settled, the next thing:",
            "Now that this part stands, on we go.",
        ),
        "acceptance": (
            "I will do it that way.",
            "Fine, I take the first one.",
            "Sold. I start tomorrow.",
            "Then that is the plan.",
            "I have put it on my list for tonight.",
            "Convinced, no more doubts.",
        ),
        "learning": (
            "Ah, so that is why.",
            "Now I see how it hangs together.",
            "I had that wrong all my life, good to know.",
            "I did not know that.",
            "It makes sense to me at last.",
            "One learns something every day.",
        ),
        "result": (
            "I tried it, and it works.",
            "Done, the error is gone.",
            "My sister ate two pieces of it.",
            "It runs through now, no complaints.",
            "We did it yesterday and had a lovely time.",
            "Problem solved on the first try.",
        ),
        "correction": (
            "No, I meant something else.",
            "That is not right.",
            "The second step contradicts the first.",
            "You left out what I told you about the budget.",
            "Two of these do not exist.",
            "Check that again, the numbers do not add up.",
        ),
        "complaint": (
            "That does not help me.",
            "Great, now I have two problems.",
            "Thanks for nothing.",
            "This is useless.",
            "I expected more.",
            "Wonderful. An hour of my life gone.",
        ),
        "confusion": (
            "I do not understand a word.",
            "That is too much at once.",
            "You lost me at the first step.",
            "Can you say it in plain words?",
            "What is that supposed to mean?",
            "My head is spinning.",
        ),
        "off_topic": (
            "I did not ask for that.",
            "What has that to do with my question?",
            "Nice, but I wanted something different.",
            "That is beside the point.",
            "You answer a question that nobody asked.",
            "Interesting, for somebody else perhaps.",
        ),
        "giving_up": (
            "Forget it.",
            "Never mind, I will ask my brother.",
            "I look it up myself, thanks.",
            "Let us drop it.",
            "This leads nowhere. Bye.",
            "I am done here.",
        ),
    },
    again=("Once more:", "I said:", "Please read it again."),
    either=(
        "Well, that is something.",
        "Wonderful, just what one hopes for.",
        "I see.",
        "That tells me a lot.",
        "Okay then.",
        "Good to know where I stand.",
    ),
    evasive=(
        "I would rather not go into {topic}.",
        "{topic}? Somebody else will know.",
        "There is nothing to be said about {topic}, I think.",
    ),
)

GERMAN = Language(
    share=0.18,
    topics={
        "travel": ("ein Wochenende in Lissabon", "Nachtzüge", "ein Hotel am Meer"),
        "cooking": ("Sauerteig", "einen Geburtstagskuchen", "Linsensuppe"),
        "code": ("einen fehlschlagenden Test", "Merge-Konflikte", "eine langsame Abfrage"),
        "money": ("einen Sparplan", "Kartengebühren", "eine falsche Rechnung"),
        "health": ("schmerzende Knie", "besseren Schlaf", "einen Dehnplan"),
        "writing": ("einen Beschwerdebrief", "eine Dankeskarte", "eine Rede"),
    },
    requests={
        "explain": ("Was muss ich über {topic} wissen?", "Erklär mir etwas über {topic}."),
        "compare": (
            "Welche Möglichkeiten gibt es für {topic}, und welche ist besser?",
            "Vergleiche zwei Wege für {topic}.",
        ),
        "create": ("Schreib mir ein paar Zeilen über {topic}.", "Ich brauche Text über {topic}."),
        "fix": (
            "Ich habe ein Problem, es geht um {topic}. Was tun?",
            "Meine Freundin ist unzufrieden, es geht um {topic}. Hast du einen Rat?",
        ),
        "plan": ("Mach einen Plan für {topic}.", "Gib mir eine Liste für {topic}."),
    },
    answers=(
        "Für {topic} gilt: klein anfangen, alles aufschreiben, nach einer Woche ansehen.",
        "Für {topic} gibt es zwei Wege. Der erste geht schnell, der zweite hält länger.",
        "Danke für die Frage. Für {topic} würde ich zuerst prüfen, was schon da ist.",
        "Der häufigste Fehler bei so etwas: alles auf einmal zu wollen.",
    ),
    goodbyes=("Gern geschehen.", "In Ordnung.", "Viel Erfolg!"),
    causes={
        "gratitude": ("Vielen Dank.", "Danke, das war nett.", "Du hast mir den Abend gerettet."),
        "praise": ("Genau das wollte ich.", "Super Antwort.", "Gar nicht übel."),
        "follow_up": ("Gut, und darauf aufbauend:", "Spannend, weiter:", "Das steht, jetzt dies:"),
        "acceptance": ("So mache ich es.", "Gut, ich nehme das erste.", "Überzeugt."),
        "learning": ("Ach, deshalb!", "Jetzt verstehe ich es.", "Wieder etwas gelernt."),
        "result": ("Ich habe es probiert, es klappt.", "Der Fehler ist weg.", "Alles läuft."),
        "correction": ("Nein, ich meinte etwas anderes.", "Das stimmt nicht.", "Rechne noch mal."),
        "complaint": ("Das hilft mir nicht.", "Toll, jetzt habe ich zwei Probleme.", "Na danke."),
        "confusion": ("Ich verstehe kein Wort.", "Das ist zu viel.", "Mir schwirrt der Kopf."),
        "off_topic": ("Danach habe ich nicht gefragt.", "Was soll das?", "Schön, nur für wen?"),
        "giving_up": ("Vergiss es.", "Ich frage lieber meinen Bruder.", "Das führt zu nichts."),
    },
    again=("Noch einmal:", "Ich sagte:"),
    either=("Na, das ist doch was.", "Ich verstehe.", "Das sagt mir einiges.", "Gut zu wissen."),
    evasive=("Dazu möchte ich nichts sagen.", "Wer weiß das schon so genau?"),
)

SPANISH = Language(
    share=0.12,
    topics={
        "travel": ("un fin de semana en Lisboa", "trenes nocturnos", "un hotel en la costa"),
        "cooking": ("la masa madre", "una tarta", "la sopa de lentejas"),
        "code": ("una prueba que falla", "los conflictos de versiones", "una consulta lenta"),
        "money": ("un plan de ahorro", "las comisiones", "una factura errónea"),
        "health": ("el dolor de rodillas", "el sueño", "los estiramientos"),
        "writing": ("una carta de queja", "una nota de agradecimiento", "un discurso"),
    },
    requests={
        "explain": ("¿Qué debo saber sobre {topic}?", "Explícame algo sobre {topic}."),
        "compare": ("¿Qué opciones hay para {topic}?", "Compara dos formas para {topic}."),
        "create": ("Escribe unas líneas sobre {topic}.", "Necesito un texto sobre {topic}."),
        "fix": ("Tengo un problema con {topic}. ¿Qué hago?", "Algo va mal con {topic}."),
        "plan": ("Haz un plan para {topic}.", "Dame una lista para {topic}."),
    },
    answers=(
        "Para {topic}: empieza poco a poco y anota lo que encuentres.",
        "Hay dos caminos para {topic}. El primero es rápido, el segundo dura más.",
        "Gracias por preguntar. Para {topic} miraría primero lo que ya tienes.",
        "El error más común es quererlo todo a la vez.",
    ),
    goodbyes=("De nada.", "De acuerdo.", "¡Suerte!"),
    causes={
        "gratitude": ("Muchas gracias.", "Te lo agradezco.", "Me has salvado la tarde."),
        "praise": ("Justo lo que buscaba.", "Buena respuesta.", "Nada mal."),
        "follow_up": ("Bien, y a partir de ahí:", "Interesante, sigamos:", "Eso ya está, ahora:"),
        "acceptance": ("Lo haré así.", "Vale, me quedo con la primera.", "Convencido."),
        "learning": ("Ah, por eso.", "Ahora lo entiendo.", "Algo nuevo cada día."),
        "result": ("Lo probé y funciona.", "El error ya no sale.", "Todo en marcha otra vez."),
        "correction": ("No, quería decir otra cosa.", "Eso no es cierto.", "Revisa las cuentas."),
        "complaint": ("No me sirve.", "Genial, ahora tengo dos problemas.", "Pues vaya ayuda."),
        "confusion": ("No entiendo nada.", "Es demasiado.", "Me da vueltas la cabeza."),
        "off_topic": ("No pregunté eso.", "¿Y eso qué tiene que ver?", "Bonito, pero ¿para quién?"),
        "giving_up": ("Olvídalo.", "Mejor pregunto a mi hermano.", "Esto no lleva a nada."),
    },
    again=("Otra vez:", "He dicho:"),
    either=("Vaya, eso ya es algo.", "Ya veo.", "Eso me dice mucho.", "Es bueno saberlo."),
    evasive=("Prefiero no hablar de eso.", "Quién lo sabe, la verdad."),
)

LANGUAGES: Mapping[str, Language] = {"en": ENGLISH, "de": GERMAN, "es": SPANISH}
