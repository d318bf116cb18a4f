#include "bind.h"
#include "decode_attention/decode_attention.h"

using namespace fp8kernels;

namespace {

// codes, batch_stride, head_stride, token_stride, scale
HeadCodes head_codes(const py::tuple& t) {
    return {pointer<const uint8_t>(t[0].cast<uintptr_t>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
            t[3].cast<int64_t>(), pointer<const float>(t[4].cast<uintptr_t>())};
}

}  // namespace

void bind_decode_attention(py::module_& m) {
    m.def("decode_attention_workspace", &decode_attention_workspace, py::arg("batch"), py::arg("kv_heads"),
          py::arg("rows"), py::arg("tokens"), py::arg("head_dim"));
    m.def(
        "decode_attention",
        [](uintptr_t q, int64_t q_batch_stride, int64_t q_head_stride, int64_t q_row_stride, const py::tuple& keys,
           const py::tuple& values, int64_t batch, int64_t kv_heads, int64_t group, int64_t queries, int64_t tokens,
           int64_t head_dim, float scaling, uintptr_t mask, int64_t mask_batch_stride, int64_t mask_row_stride,
           uintptr_t out, uintptr_t workspace, int type, int fmt, int threads) {
            const DecodeAttentionArgs args{pointer<const void>(q),
                                           q_batch_stride,
                                           q_head_stride,
                                           q_row_stride,
                                           head_codes(keys),
                                           head_codes(values),
                                           batch,
                                           kv_heads,
                                           group,
                                           queries,
                                           tokens,
                                           head_dim,
                                           scaling,
                                           pointer<const uint8_t>(mask),
                                           mask_batch_stride,
                                           mask_row_stride,
                                           pointer<void>(out),
                                           pointer<float>(workspace),
                                           static_cast<QueryType>(type),
                                           static_cast<FormatId>(fmt),
                                           threads};
            const py::gil_scoped_release release;
            decode_attention(args);
        },
        py::arg("q"), py::arg("q_batch_stride"), py::arg("q_head_stride"), py::arg("q_row_stride"), py::arg("keys"),
        py::arg("values"), py::arg("batch"), py::arg("kv_heads"), py::arg("group"), py::arg("queries"),
        py::arg("tokens"), py::arg("head_dim"), py::arg("scaling"), py::arg("mask"), py::arg("mask_batch_stride"),
        py::arg("mask_row_stride"), py::arg("out"), py::arg("workspace"), py::arg("type"), py::arg("fmt"),
        py::arg("threads"));
}
