// Messages to TensorRT's logger, which belongs to the process that loaded the library.
#pragma once

#include <string>

#include "NvInfer.h"

namespace effc::trt {

using Severity = nvinfer1::ILogger::Severity;

void set_logger_finder(nvinfer1::ILoggerFinder* finder);

// Goes to stderr where the process gave no logger.
void log(Severity severity, const std::string& message);

}  // namespace effc::trt
