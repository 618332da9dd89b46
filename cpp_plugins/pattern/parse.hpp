// The text form of a pattern, for example "local:256|global:16".
#pragma once

#include <string>

#include "pattern/pattern.hpp"

namespace effc {

// Reads `text` into `pattern` and returns "", or returns a message that says what is wrong and what to write instead.
// `causal` is needed here because it changes what some forms mean, not only which half of them is visible: local:W
// spans W positions in both cases, on two sides or on one.
std::string parse_pattern(const std::string& text, bool causal, Pattern& pattern);

}  // namespace effc
