"""Countries with a flag that is told apart from the others, and what is true of them.

Left out, because at 96 pixels their flags are taken for another's: Monaco and Singapore (Indonesia's), Chad and Moldova
(Romania's), Luxembourg and Paraguay (the Netherlands'), Honduras, Nicaragua and El Salvador (Argentina's), Mali and
Guinea (Senegal's), Yemen (Egypt's), Montenegro (Vietnam's), Samoa (Taiwan's), Niger (India's), Bolivia (Ghana's),
Liberia (the United States').
"""

from __future__ import annotations

import dataclasses

from fastedit.pocket.facts import COUNTRIES

# ISO code, name, currency, language; "-" within a name stands for a space, "*" for "more than one in wide use".
_ROWS = """FR France euro French, IT Italy euro Italian, IE Ireland euro English, BE Belgium euro *, RO Romania leu
    Romanian, DE Germany euro German, NL Netherlands euro Dutch, RU Russia ruble Russian, AT Austria euro German, HU
    Hungary forint Hungarian, BG Bulgaria lev Bulgarian, EE Estonia euro Estonian, LT Lithuania euro Lithuanian, UA
    Ukraine hryvnia Ukrainian, PL Poland zloty Polish, SE Sweden krona Swedish, FI Finland euro Finnish, DK Denmark
    krone Danish, NO Norway krone Norwegian, IS Iceland krona Icelandic, CH Switzerland franc *, ES Spain euro
    Spanish, PT Portugal euro Portuguese, GR Greece euro Greek, HR Croatia euro Croatian, RS Serbia dinar Serbian, SK
    Slovakia euro Slovak, SI Slovenia euro Slovenian, LV Latvia euro Latvian, AL Albania lek Albanian, BY Belarus
    ruble *, GB United-Kingdom pound English, CZ Czech-Republic koruna Czech, CY Cyprus euro Greek, MK North-Macedonia
    denar Macedonian, AM Armenia dram Armenian, ID Indonesia rupiah Indonesian, JP Japan yen Japanese, BD Bangladesh
    taka Bengali, CN China yuan Chinese, TH Thailand baht Thai, VN Vietnam dong Vietnamese, MN Mongolia tugrik
    Mongolian, NP Nepal rupee Nepali, IR Iran rial Persian, IQ Iraq dinar Arabic, JO Jordan dinar Arabic, LB Lebanon
    pound Arabic, SY Syria pound Arabic, QA Qatar riyal Arabic, OM Oman rial Arabic, PK Pakistan rupee Urdu, AF
    Afghanistan afghani *, UZ Uzbekistan som Uzbek, KH Cambodia riel Khmer, LA Laos kip Lao, PH Philippines peso *, BT
    Bhutan ngultrum Dzongkha, MY Malaysia ringgit Malay, IN India rupee *, KR South-Korea won Korean, KP North-Korea
    won Korean, SA Saudi-Arabia riyal Arabic, TR Turkey lira Turkish, IL Israel shekel Hebrew, AE United-Arab-Emirates
    dirham Arabic, KW Kuwait dinar Arabic, BH Bahrain dinar Arabic, MM Myanmar kyat Burmese, LK Sri-Lanka rupee *, KZ
    Kazakhstan tenge *, TW Taiwan dollar *, GE Georgia lari Georgian, AZ Azerbaijan manat Azerbaijani, NG Nigeria
    naira English, EG Egypt pound Arabic, KE Kenya shilling *, ET Ethiopia birr Amharic, GH Ghana cedi English, SN
    Senegal franc French, MA Morocco dirham Arabic, DZ Algeria dinar Arabic, TN Tunisia dinar Arabic, LY Libya dinar
    Arabic, SD Sudan pound Arabic, UG Uganda shilling *, RW Rwanda franc *, ZW Zimbabwe dollar *, AO Angola kwanza
    Portuguese, MG Madagascar ariary *, SO Somalia shilling Somali, NA Namibia dollar English, BW Botswana pula *, ZA
    South-Africa rand *, TZ Tanzania shilling Swahili, CM Cameroon franc *, CI Ivory-Coast franc French, PE Peru sol
    Spanish, AR Argentina peso Spanish, CL Chile peso Spanish, CO Colombia peso Spanish, EC Ecuador dollar Spanish, VE
    Venezuela bolivar Spanish, UY Uruguay peso Spanish, BR Brazil real Portuguese, GY Guyana dollar English, CA Canada
    dollar *, US United-States dollar English, MX Mexico peso Spanish, CU Cuba peso Spanish, JM Jamaica dollar
    English, HT Haiti gourde *, PA Panama balboa Spanish, BS Bahamas dollar English, GT Guatemala quetzal Spanish, CR
    Costa-Rica colon Spanish, DO Dominican-Republic peso Spanish, AU Australia dollar English, NZ New-Zealand dollar
    English, FJ Fiji dollar *"""
# Capital and continent of those that the pocket world does not have.
_MORE = """United-Kingdom London Europe, Czech-Republic Prague Europe, Cyprus Nicosia Europe, North-Macedonia Skopje
    Europe, India New-Delhi Asia, South-Korea Seoul Asia, North-Korea Pyongyang Asia, Saudi-Arabia Riyadh Asia, Turkey
    Ankara *, Israel Jerusalem Asia, United-Arab-Emirates Abu-Dhabi Asia, Kuwait * Asia, Bahrain Manama Asia, Myanmar
    Naypyidaw Asia, Sri-Lanka Colombo Asia, Kazakhstan Astana Asia, Taiwan Taipei Asia, Georgia Tbilisi *, Azerbaijan
    Baku *, South-Africa * Africa, Tanzania Dodoma Africa, Cameroon Yaounde Africa, Ivory-Coast Yamoussoukro Africa,
    United-States Washington North-America, Mexico Mexico-City North-America, Guatemala * North-America, Costa-Rica
    San-Jose North-America, Dominican-Republic Santo-Domingo North-America, New-Zealand Wellington Oceania"""
# People say "the Netherlands".
_WITH_THE = (
    "Netherlands", "United Kingdom", "Czech Republic", "Philippines", "United Arab Emirates", "United States",
    "Bahamas", "Dominican Republic",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Country:
    """A country; None where the one true answer is disputed or there are several.

    code: the flag's code points, "1F1EF-1F1F5" for Japan's: the stem of the icon's file.
    """

    name: str
    code: str
    capital: str | None
    continent: str | None
    currency: str | None
    language: str | None

    @property
    def phrase(self) -> str:
        """Return the name as it stands in a sentence: "Japan", "the Netherlands"."""
        return f"the {self.name}" if self.name in _WITH_THE else self.name


def _value(text: str) -> str | None:
    return None if text == "*" else text.replace("-", " ")


def _countries() -> dict[str, Country]:
    places: dict[str, tuple[str | None, str | None]] = dict(COUNTRIES)
    for row in _MORE.split(","):
        name, capital, continent = map(_value, row.split())
        places[str(name)] = (capital, continent)
    rows: dict[str, Country] = {}
    for row in _ROWS.split(","):
        iso, title, currency, language = row.split()
        # A flag is two regional indicators, one for each letter of the ISO code.
        code = "-".join(f"{0x1F1E6 + ord(letter) - ord('A'):X}" for letter in iso)
        name = title.replace("-", " ")
        rows[name] = Country(name, code, *places[name], _value(currency), _value(language))
    return rows


#: Every country by its name, in a fixed order.
FLAG_COUNTRIES: dict[str, Country] = _countries()
