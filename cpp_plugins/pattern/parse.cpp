#include "pattern/parse.hpp"

#include <algorithm>
#include <cstdlib>
#include <vector>

namespace effc {
namespace {

constexpr const char* kForms =
    "dense, local:W, local:LEFT:RIGHT, dilated:W:D, block:B, block:B:N, strided:S, random:R, random:R:SEED, global:G, "
    "global:TOKEN+TOKEN, sinks:K";

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == separator) {
      parts.emplace_back();
    } else if (c != ' ') {
      parts.back() += c;
    }
  }
  return parts;
}

Term band(Position left, Position right, Position step) {
  Term term{};
  term.kind = TermKind::kBand;
  term.left = left;
  term.right = right;
  term.step = step;
  return term;
}

Term blocks(Position block, Position reach) {
  Term term{};
  term.kind = TermKind::kBlocks;
  term.block = block;
  term.reach = reach;
  return term;
}

Term first(TermKind kind, Position count) {
  Term term{};
  term.kind = kind;
  term.count = count;
  return term;
}

Term random_blocks(Position count, int32_t seed) {
  Term term{};
  term.kind = TermKind::kRandom;
  term.count = count;
  term.seed = seed;
  return term;
}

Term marked_tokens() {
  Term term{};
  term.kind = TermKind::kMarked;
  return term;
}

// One term of the text and the parameters it was written with.
struct Written {
  std::string text;
  std::string name;
  std::vector<Position> parameters;
  std::vector<int32_t> seeds;  // the parameters modulo kRandomPrime, which is all that counts of a seed
};

// "cls+#102": which tokens are meant is settled by whoever feeds the marks; here it only has to be a list of tokens.
bool names_tokens(const std::string& text) {
  for (const std::string& token : split(text, '+')) {
    const bool id = !token.empty() && token[0] == '#';
    const std::string rest = id ? token.substr(1) : token;
    const char* allowed = id ? "0123456789" : "abcdefghijklmnopqrstuvwxyz";
    if (rest.empty() || rest.find_first_not_of(allowed) != std::string::npos) return false;
  }
  return true;
}

// Reads "name:1:2". A parameter above kMaxLength reaches further than any sequence and means the same as kMaxLength.
std::string read_term(const std::string& text, Written& written) {
  const std::vector<std::string> parts = split(text, ':');
  written.text = text;
  written.name = parts[0];
  if (written.name == "global" && parts.size() == 2 && names_tokens(parts[1])) {
    written.name = "global tokens";
    return "";
  }
  for (size_t p = 1; p < parts.size(); ++p) {
    const std::string& digits = parts[p];
    if (digits.empty() || digits.find_first_not_of("0123456789") != std::string::npos) {
      return "'" + digits + "' in the pattern term '" + text + "' is not a whole number. Known forms: " + kForms + ".";
    }
    const bool huge = digits.size() > 9 || std::strtol(digits.c_str(), nullptr, 10) > kMaxLength;
    written.parameters.push_back(huge ? kMaxLength : static_cast<Position>(std::strtol(digits.c_str(), nullptr, 10)));
    int64_t seed = 0;
    for (const char digit : digits) seed = (seed * 10 + (digit - '0')) % kRandomPrime;
    written.seeds.push_back(static_cast<int32_t>(seed));
  }
  return "";
}

Position clamp_product(Position a, Position b) {
  const int64_t product = int64_t{a} * b;
  return product > kMaxLength ? kMaxLength : static_cast<Position>(product);
}

// Appends the terms that `written` stands for; returns false if the form is unknown or has the wrong parameters.
bool append_terms(const Written& written, bool causal, std::vector<Term>& terms) {
  const std::string& name = written.name;
  const std::vector<Position>& p = written.parameters;
  const size_t count = p.size();
  if (name == "dense" && count == 0) {
    terms.push_back(band(kMaxLength, kMaxLength, 1));
  } else if (name == "local" && count == 1 && p[0] >= 1) {
    terms.push_back(causal ? band(p[0] - 1, 0, 1) : band(p[0] / 2, p[0] / 2, 1));
  } else if (name == "local" && count == 2) {
    terms.push_back(band(p[0], p[1], 1));
  } else if (name == "dilated" && count == 2 && p[0] >= 1 && p[1] >= 1) {
    const Position left = clamp_product(causal ? p[0] - 1 : p[0] / 2, p[1]);
    terms.push_back(band(left, causal ? 0 : left, p[1]));
  } else if (name == "block" && (count == 1 || count == 2) && p[0] >= 1) {
    // A reach of kMaxLength / block spans any sequence; more would overflow.
    terms.push_back(blocks(p[0], count == 2 ? smaller(p[1], kMaxLength / p[0]) : 0));
  } else if (name == "strided" && count == 1 && p[0] >= 1) {
    terms.push_back(band(kMaxLength, kMaxLength, p[0]));
  } else if (name == "random" && (count == 1 || count == 2)) {
    terms.push_back(random_blocks(p[0], count == 2 ? written.seeds[1] : 0));
  } else if (name == "global tokens") {
    terms.push_back(marked_tokens());
  } else if (name == "global" && count == 1) {
    terms.push_back(first(TermKind::kFirstKeys, p[0]));
    terms.push_back(first(TermKind::kFirstQueries, p[0]));
  } else if (name == "sinks" && count == 1) {
    terms.push_back(first(TermKind::kFirstKeys, p[0]));
  } else {
    return false;
  }
  return true;
}

}  // namespace

std::string parse_pattern(const std::string& text, bool causal, Pattern& pattern) {
  std::vector<Term> terms;
  for (const std::string& part : split(text, '|')) {
    Written written;
    const std::string problem = read_term(part, written);
    if (!problem.empty()) return problem;
    if (!append_terms(written, causal, terms)) {
      return "'" + part + "' is not an attention pattern that this library knows. Known forms: " + kForms +
             "; join several with '|'. Without the library the model runs through its function body.";
    }
  }
  if (terms.size() > static_cast<size_t>(kMaxTerms)) {
    return "The pattern '" + text + "' has more than " + std::to_string(kMaxTerms) + " terms. Use fewer.";
  }
  pattern = Pattern{};
  pattern.term_count = static_cast<int32_t>(terms.size());
  pattern.causal = causal;
  std::copy(terms.begin(), terms.end(), pattern.terms);
  return "";
}

}  // namespace effc
