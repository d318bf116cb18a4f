// CHECK for the C++ tests: prints where and what, and counts; main() returns failures().
#pragma once

#include <cstdio>

inline int& failures() {
    static int count = 0;
    return count;
}

// The rest of the arguments is a printf format and its values, shown when `condition` is false.
#define CHECK(condition, ...)                                                        \
    do {                                                                             \
        if (!(condition)) {                                                          \
            if (++failures() <= 20) {                                                \
                std::printf("%s:%d: %s is false: ", __FILE__, __LINE__, #condition); \
                std::printf(__VA_ARGS__);                                            \
                std::printf("\n");                                                   \
            }                                                                        \
        }                                                                            \
    } while (0)

inline int report(const char* what) {
    std::printf("%s: %d failures\n", what, failures());
    return failures() == 0 ? 0 : 1;
}
